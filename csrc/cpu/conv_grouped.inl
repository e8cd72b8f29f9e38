// The convolutions in groups of conv_grouped.h for one instruction set: the register tile of conv_tile.inl, in which each lane of a
// vector multiplies the input channels of its own group. How the value of lane l for the k-th input channel of its group is found
// depends on the widths of the groups, below.

struct GroupedPanel {
  int64_t vectors, begin;  // begin: of its packed weights, for each tap and input channel of a group
  int64_t out[kTileVectors], in[kTileVectors];  // first output channel of a vector; first input channel that it reads
};

enum class Spread { plain, permuted, expanded, single, shared };

static Spread spread_of(const GroupShape& s) {
  if (s.group_out > W) return Spread::shared;
  if (s.group_out == W) return Spread::single;
  if (W % s.group_out == 0 && s.group_out <= 8) {
    if (s.group_in == s.group_out) return s.group_in == 1 ? Spread::plain : Spread::permuted;
    if (2 * s.group_in == s.group_out) return Spread::permuted;
  }
  return Spread::expanded;
}

// Where this is faster than oneDNN and ATen, mostly by half as much again and more (two cores of Zen 3, AVX2). They are better at
// groups whose last vector would have lanes to spare, at wide groups, and at gathering many channels.
static bool grouped_serves(const GroupShape& s, int64_t taps) {
  if (s.in_channels < W || s.out_channels < W) return false;
  switch (spread_of(s)) {
    case Spread::shared: return s.group_out % W == 0 && taps > 1 && s.group_in <= 128 && s.group_out <= 128;
    case Spread::expanded: return s.group_in <= 4;
    default: return true;
  }
}

// The last vector starts W channels before the end, and some channels may be computed twice.
static int64_t all_vectors(const GroupShape& s) { return (s.out_channels + W - 1) / W; }
static int64_t grouped_floats(const GroupShape& s) { return all_vectors(s) * W; }

// Wide groups have panels of their own.
static int64_t group_panels(const GroupShape& s) { return (s.group_out + kPanel - 1) / kPanel; }
static int64_t grouped_panels(const GroupShape& s) {
  return s.group_out > W ? s.out_channels / s.group_out * group_panels(s)
                         : (all_vectors(s) + kTileVectors - 1) / kTileVectors;
}

static GroupedPanel panel_of(const GroupShape& s, int64_t index) {
  GroupedPanel p;
  int64_t first = index * kPanel;
  if (s.group_out > W) {
    const int64_t group = index / group_panels(s), part = index % group_panels(s);
    p.vectors = panel_vectors(s.group_out, part);
    first = group * s.group_out + part * kPanel;
  } else {
    p.vectors = panel_vectors(s.out_channels, index);
  }
  p.begin = first;
  for (int64_t v = 0; v < p.vectors; ++v) {
    const int64_t out = first + v * W;
    p.out[v] = out + W <= s.out_channels ? out : s.out_channels - W;
    p.in[v] = p.out[v] / s.group_out * s.group_in;
  }
  return p;
}

// f(tap, k, column) for each value of a panel, in the order in which they are packed.
template <class F>
FASTRES_INLINE void for_each_packed(const GroupShape& s, const GroupedPanel& p, int64_t taps, const F& f) {
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t k = 0; k < s.group_in; ++k) {
      for (int64_t column = 0; column < p.vectors * W; ++column) f(tap, k, column);
    }
  }
}

static bool grouped_pack(const GroupShape& s, const WeightView& w, int64_t group_stride, int64_t taps, const int64_t* r,
                         const int64_t* t, int64_t panel, float* packed) {
  const GroupedPanel p = panel_of(s, panel);
  const int64_t columns = p.vectors * W;
  float* out = packed + p.begin * taps * s.group_in;
  int64_t from[kPanel];  // of a column
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t channel = p.out[i / W] + i % W;
    from[i] = channel / s.group_out * group_stride + channel % s.group_out * w.stride_k;
  }
  int32_t largest = 0;  // as in gemm_pack
  for_each_packed(s, p, taps, [&](int64_t tap, int64_t k, int64_t column) {
    int32_t bits;
    __builtin_memcpy(&bits, w.data + from[column] + k * w.stride_c + r[tap] * w.stride_r + t[tap] * w.stride_s,
                     sizeof bits);
    __builtin_memcpy(out + (tap * s.group_in + k) * columns + column, &bits, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  });
  return largest < 0x7f800000;
}

static void grouped_unpack(const GroupShape& s, int64_t taps, int64_t panel, const float* packed, float* weight) {
  const GroupedPanel p = panel_of(s, panel);
  const int64_t columns = p.vectors * W;
  const float* in = packed + p.begin * taps * s.group_in;
  int64_t to[kPanel];  // of a column
  for (int64_t i = 0; i < columns; ++i) to[i] = (p.out[i / W] + i % W) * taps * s.group_in;
  for_each_packed(s, p, taps, [&](int64_t tap, int64_t k, int64_t column) {
    weight[to[column] + tap * s.group_in + k] = in[(tap * s.group_in + k) * columns + column];
  });
}

// The input channels of a panel are copied, with zeros around the image, to where they lie next to each other: strides of whole
// pixels would put all of them into few sets of the first cache. What follows says how much is copied of a pixel, and what the lanes
// of vector v multiply for the k-th input channel of their group, which starts k * step() after the first.

// First input channels of the vectors.
template <int NV>
struct FirstChannels {
  int64_t in[NV];
  explicit FirstChannels(const GroupedPanel& p) {
    for (int v = 0; v < NV; ++v) in[v] = p.in[v];
  }
};

// f(Vectors<0>) to f(Vectors<COUNT - 1>).
template <int COUNT, class F>
FASTRES_INLINE void for_each_number(const F& f) {
  if constexpr (COUNT > 0) {
    for_each_number<COUNT - 1>(f);
    f(Vectors<COUNT - 1>{});
  }
}

// Depthwise: lane l reads channel l.
template <int NV>
struct PlainInput : FirstChannels<NV> {
  static constexpr int kDepth = 1, kTerms = 5;
  PlainInput(const GroupShape&, const GroupedPanel& p) : FirstChannels<NV>(p) {}
  FASTRES_INLINE_MEMBER int64_t pixel() const { return NV * W; }
  FASTRES_INLINE_MEMBER int64_t step() const { return 0; }
  FASTRES_INLINE_MEMBER void copy(const float* x, float* to) const {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(to + v * W, load(x + this->in[v]));
  }
  FASTRES_INLINE_MEMBER vf value(const float* at, int v) const { return load(at + v * W); }
};

// Groups of IN and OUT channels that divide a vector: lanes take theirs from one vector.
template <int NV, int IN, int OUT>
struct PermutedInput : FirstChannels<NV> {
  static constexpr int kDepth = IN, kTerms = 4, kWidth = W / OUT * IN;
  PermutedInput(const GroupShape&, const GroupedPanel& p) : FirstChannels<NV>(p) {}
  FASTRES_INLINE_MEMBER int64_t pixel() const { return NV * kWidth; }
  FASTRES_INLINE_MEMBER int64_t step() const { return 0; }
  FASTRES_INLINE_MEMBER void copy(const float* x, float* to) const {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) __builtin_memcpy(to + v * kWidth, x + this->in[v], kWidth * sizeof(float));
  }
  static FASTRES_INLINE_MEMBER vi lanes(int32_t k) { return lane_numbers() / OUT * IN + k; }
  static FASTRES_INLINE_MEMBER vf permuted(vf values, vi lanes) {
    return IN == OUT ? permute_in_halves(values, lanes) : permute(values, lanes);
  }
  template <int K>
  static FASTRES_INLINE_MEMBER vf spread(vf values) {
#if FASTRES_LEVEL == 1
    if constexpr (IN == OUT) return (vf)_mm256_permute_ps((__m256)values, OUT == 4 ? K * 0x55 : K ? 0xf5 : 0xa0);
#endif
    return permute(values, lanes(K));
  }
  FASTRES_INLINE_MEMBER vf value(const float* at, int v) const { return load(at + v * kWidth); }
};

// Any narrow groups: the copy has a vector for each input channel of a group.
template <int NV>
struct ExpandedInput : FirstChannels<NV> {
  static constexpr int kDepth = 0, kTerms = 6;
  const int64_t depth;
  vi lanes[NV];
  ExpandedInput(const GroupShape& s, const GroupedPanel& p) : FirstChannels<NV>(p), depth(s.group_in) {
    for (int v = 0; v < NV; ++v) {
      for (int64_t i = 0; i < W; ++i) {
        lanes[v][i] = static_cast<int32_t>((p.out[v] + i) / s.group_out * s.group_in - p.in[v]);
      }
    }
  }
  FASTRES_INLINE_MEMBER int64_t pixel() const { return depth * NV * W; }
  FASTRES_INLINE_MEMBER int64_t step() const { return NV * W; }
  FASTRES_INLINE_MEMBER void copy(const float* x, float* to) const {
    for (int64_t k = 0; k < depth; ++k, to += NV * W) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(to + v * W, gather(x + this->in[v] + k, lanes[v]));
    }
  }
  FASTRES_INLINE_MEMBER vf value(const float* at, int v) const { return load(at + v * W); }
};

// A vector is a group.
template <int NV>
struct SingleInput : FirstChannels<NV> {
  static constexpr int kDepth = 0, kTerms = 6;
  const int64_t depth;
  SingleInput(const GroupShape& s, const GroupedPanel& p) : FirstChannels<NV>(p), depth(s.group_in) {}
  FASTRES_INLINE_MEMBER int64_t pixel() const { return NV * depth; }
  FASTRES_INLINE_MEMBER int64_t step() const { return 1; }
  FASTRES_INLINE_MEMBER void copy(const float* x, float* to) const {
    for_each_vector(NV * depth, [&](int64_t i, auto n) { store(to + i, load(x + this->in[0] + i, n), n); });
  }
  FASTRES_INLINE_MEMBER vf value(const float* at, int v) const { return splat(at[v * depth]); }
};

// All vectors of a panel are of one group.
template <int NV>
struct SharedInput : FirstChannels<NV> {
  static constexpr int kDepth = 0, kTerms = 6;
  const int64_t depth;
  SharedInput(const GroupShape& s, const GroupedPanel& p) : FirstChannels<NV>(p), depth(s.group_in) {}
  FASTRES_INLINE_MEMBER int64_t pixel() const { return depth; }
  FASTRES_INLINE_MEMBER int64_t step() const { return 1; }
  FASTRES_INLINE_MEMBER void copy(const float* x, float* to) const {
    for_each_vector(depth, [&](int64_t i, auto n) { store(to + i, load(x + this->in[0] + i, n), n); });
  }
  FASTRES_INLINE_MEMBER vf value(const float* at, int) const { return splat(*at); }
};

// Floats of the copy of a pixel; fewer where a panel has fewer vectors.
static int64_t grouped_copy_floats(const GroupShape& s) {
  switch (spread_of(s)) {
    case Spread::shared: return s.group_in;
    case Spread::single: return kTileVectors * s.group_in;
    case Spread::expanded: return kPanel * s.group_in;
    default: return kPanel;
  }
}

// f(input) for the panel's way to read its input.
template <int NV, class F>
FASTRES_INLINE void with_input(const GroupShape& s, const GroupedPanel& p, const F& f) {
  switch (spread_of(s)) {
    case Spread::plain: return f(PlainInput<NV>(s, p));
    case Spread::expanded: return f(ExpandedInput<NV>(s, p));
    case Spread::single: return f(SingleInput<NV>(s, p));
    case Spread::shared: return f(SharedInput<NV>(s, p));
    case Spread::permuted: break;
  }
  const bool half = s.group_in < s.group_out;
  switch (s.group_out) {
    case 2: return half ? f(PermutedInput<NV, 1, 2>(s, p)) : f(PermutedInput<NV, 2, 2>(s, p));
    case 4: return half ? f(PermutedInput<NV, 2, 4>(s, p)) : f(PermutedInput<NV, 4, 4>(s, p));
#if FASTRES_LEVEL >= 2
    case 8: return half ? f(PermutedInput<NV, 4, 8>(s, p)) : f(PermutedInput<NV, 8, 8>(s, p));
#endif
  }
}

template <class Input>
FASTRES_INLINE void copy_input(const GemmConv& c, const GroupedBlock& block, const Input input, float* to) {
  const int64_t pixel = input.pixel(), right = c.width - block.left, stride = c.x_pixel, columns = block.columns;
  for (int64_t i = 0; i < block.rows; ++i, to += columns * pixel) {
    const int64_t h = block.top + i;
    const bool inside = h >= 0 && h < c.height;
    const int64_t first = !inside || right <= 0 ? columns : block.left < 0 ? -block.left : 0;
    const int64_t last = right < columns ? right : columns;
    for (int64_t n = 0; n < (first < columns ? first : columns) * pixel; ++n) to[n] = 0.0f;
    if (first >= columns) continue;
    const float* x = block.image + (h * c.width + block.left + first) * stride;
    for (int64_t w = first; w < last; ++w, x += stride) {
      __builtin_prefetch(x + input.in[0] + kPanel, 0, 2);  // for the next panel
      input.copy(x, to + w * pixel);
    }
    for (int64_t n = last * pixel; n < columns * pixel; ++n) to[n] = 0.0f;
  }
}

template <int NV, class Input>
FASTRES_INLINE void grouped_panel(const GemmConv& c, const GroupedBlock& block, const GroupedPanel& panel,
                                  const Input& input, float* copy) {
  const vf floor = splat(c.epilogue.relu ? 0.0f : -__builtin_inff());
  const int64_t pixel = input.pixel(), depth = Input::kDepth ? Input::kDepth : c.depth, taps = c.taps;
  const int64_t *tap_places = block.tap, *places = block.places;
  const float* residual = static_cast<const float*>(c.epilogue.residual);
  float* y = static_cast<float*>(c.y);
  int64_t out[NV];
  vf bias[NV] = {};
  for (int v = 0; v < NV; ++v) {
    out[v] = panel.out[v];
    if (c.epilogue.bias) bias[v] = load(c.epilogue.bias + out[v]);
  }
  copy_input(c, block, input, copy);
  for (int64_t i = 0; i < block.count; i += kTileRows) {
    const int64_t valid = block.count - i;
    const float* rows[kTileRows];  // a tile of fewer pixels has its last one several times
    for (int r = 0; r < kTileRows; ++r) rows[r] = copy + block.first[i + (r < valid ? r : valid - 1)] * pixel;
    const float* weight = c.weight + panel.begin * taps * depth;
    vf sums[kTileRows][NV] = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
      int64_t at = tap_places[tap] * pixel;
      if constexpr (requires { Input::kWidth; }) {
        for_each_number<Input::kDepth>([&](auto k) {
          asm("" : "+r"(at));  // read x again: the registers would not suffice to keep it for the next k
          vf column[NV];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v, weight += W) column[v] = load(weight);
#pragma GCC unroll 8
          for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              sums[r][v] += Input::template spread<decltype(k)::n>(input.value(rows[r] + at, v)) * column[v];
            }
          }
        });
      } else {
        for (int64_t k = 0; k < depth; ++k, at += input.step(), weight += NV * W) {
          vf column[NV];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) column[v] = load(weight + v * W);
#pragma GCC unroll 8
          for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sums[r][v] += input.value(rows[r] + at, v) * column[v];
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      if (r >= valid) break;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t place = places[i + r] + out[v];
        vf sum = sums[r][v] + bias[v];
        if (residual) sum += load(residual + place);
        store(y + place, at_least(floor, sum));
      }
    }
  }
}

// The tile's rows are pairs of a tap and an input channel here.
template <int NV, class Input>
FASTRES_INLINE void grouped_weight_panel(const GemmConv& c, const float* grad, const GroupedBlock& block,
                                         const GroupedPanel& panel, const Input& input, float* copy, float* all_sums) {
  constexpr int kTerms = Input::kTerms;
  const int64_t depth = Input::kDepth ? Input::kDepth : c.depth, terms = c.taps * depth, pixel = input.pixel();
  int64_t out[NV];
  for (int v = 0; v < NV; ++v) out[v] = panel.out[v];
  copy_input(c, block, input, copy);
  float* columns = copy + block.rows * block.columns * pixel + W;
  for (int64_t i = 0; i < block.count; ++i) {
    const float* from = grad + block.places[i];
    __builtin_prefetch(from + out[0] + kPanel, 0, 2);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(columns + (i * NV + v) * W, load(from + out[v]));
  }
  for (int64_t first = 0; first < terms; first += kTerms) {
    vf sums[kTerms][NV] = {};
    int64_t at[kTerms];
    vi lanes[kTerms];
    for (int64_t r = 0; r < kTerms; ++r) {
      const int64_t i = first + r < terms ? first + r : terms - 1;
      at[r] = block.tap[i / depth] * pixel + i % depth * input.step();
      if constexpr (requires { Input::kWidth; }) lanes[r] = Input::lanes(static_cast<int32_t>(i % depth));
    }
    for (int64_t i = 0; i < block.count; ++i) {
      const float* x = copy + block.first[i] * pixel;
      vf column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(columns + (i * NV + v) * W);
#pragma GCC unroll 8
      for (int r = 0; r < kTerms; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          vf values = input.value(x + at[r], v);
          if constexpr (requires { Input::kWidth; }) values = Input::permuted(values, lanes[r]);
          sums[r][v] += values * column[v];
        }
      }
    }
    float* to = all_sums + (panel.begin * terms + first * NV * W);
#pragma GCC unroll 8
    for (int r = 0; r < kTerms; ++r, to += NV * W) {
      if (first + r >= terms) break;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(to + v * W, load(to + v * W) + sums[r][v]);
    }
  }
}

static void grouped_run(const GroupShape& s, const GemmConv& conv, const GroupedBlock& block, int64_t first,
                        int64_t last, float* scratch) {
  for (int64_t i = first; i < last; ++i) {
    const GroupedPanel panel = panel_of(s, i);
    with_vectors(panel.vectors, [&](auto vectors) {
      constexpr int NV = decltype(vectors)::n;
      with_input<NV>(s, panel, [&](const auto& input) { grouped_panel<NV>(conv, block, panel, input, scratch); });
    });
  }
}

static void grouped_weight_gradient(const GroupShape& s, const GemmConv& conv, const float* grad,
                                    const GroupedBlock& block, int64_t first, int64_t last, float* scratch,
                                    float* sums) {
  for (int64_t i = first; i < last; ++i) {
    const GroupedPanel panel = panel_of(s, i);
    with_vectors(panel.vectors, [&](auto vectors) {
      constexpr int NV = decltype(vectors)::n;
      with_input<NV>(s, panel, [&](const auto& input) {
        grouped_weight_panel<NV>(conv, grad, block, panel, input, scratch, sums);
      });
    });
  }
}

constexpr GroupedKernels grouped_table = {kPanel,         grouped_serves,      grouped_panels,
                                          grouped_floats, grouped_copy_floats, grouped_pack,
                                          grouped_unpack, grouped_run,         grouped_weight_gradient};
