// Implicit-GEMM convolution of conv.h for one instruction set.

static bool gemm_pack(const WeightView& w, int64_t taps, const int64_t* r, const int64_t* s, int64_t pixels,
                      int64_t index, float* packed) {
  const int64_t columns = panel_vectors(w.out_channels, index) * W, first = index * kPanel;
  float* out = packed + first * taps * pixels * w.in_channels;
  int32_t largest = 0;  // without its sign: as integers floats are in order, and infinity and NaN are the largest
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const float* place = w.data + r[tap] * w.stride_r + (s[tap] + pixel) * w.stride_s;
      for (int64_t c = 0; c < w.in_channels; ++c, out += columns) {
        const float* value = place + c * w.stride_c + first * w.stride_k;
        const int64_t valid = w.out_channels - first < columns ? w.out_channels - first : columns;
        for (int64_t k = 0; k < valid; ++k) {
          int32_t bits;
          __builtin_memcpy(&bits, value + k * w.stride_k, sizeof bits);
          __builtin_memcpy(out + k, &bits, sizeof bits);
          bits &= 0x7fffffff;
          largest = bits > largest ? bits : largest;
        }
        for (int64_t k = valid; k < columns; ++k) out[k] = 0.0f;
      }
    }
  }
  return largest < 0x7f800000;
}

// Of an fp32 y; values [from, to) of each tap.
template <int NV>
FASTRES_INLINE void gemm_panel(const GemmConv& p, int64_t panel, int64_t count, const float* const* rows, int64_t from,
                               int64_t to, const int64_t* places) {
  const int64_t first = panel * kPanel;
  const float* weight = p.weight + first * p.taps * p.depth;
  const float* residual = static_cast<const float*>(p.epilogue.residual);
  float* y = static_cast<float*>(p.y);
  const vf floor = splat(p.epilogue.relu ? 0.0f : -__builtin_inff());
  const int64_t last_lanes = p.channels - first - (NV - 1) * W;  // of the last vector
  vf bias[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) bias[v] = p.epilogue.bias ? load(p.epilogue.bias + first + v * W) : vf{};
  for_each_tile(count, [&](int64_t i, int64_t height) __attribute__((always_inline)) {
    tile_of_rows<NV>(height, rows + i, count, p.taps, from, to, weight, [&](int r, int v, vf sum) {
      const int64_t place = places[i + r] + first + v * W;
      sum += bias[v];
      if (v == NV - 1 && last_lanes < W) {
        if (residual) sum += load(residual + place, last_lanes);
        store(y + place, at_least(floor, sum), last_lanes);
      } else {
        if (residual) sum += load(residual + place);
        store(y + place, at_least(floor, sum));
      }
    });
  });
}

// `sums` of one panel: its outputs have just been written.
template <class T>
static void sum_panel(const GemmConv& p, int64_t panel, int64_t count, const int64_t* places) {
  const int64_t first = panel * kPanel, channels = p.channels - first < kPanel ? p.channels - first : kPanel;
  constexpr int64_t kSamples = 4, kTogether = 16;  // added to one another before they are added to the rest
  for_each_vector(channels, [&](int64_t c, auto n) {
    const T* y = static_cast<const T*>(p.y) + first + c;
    vf point{}, sum1{}, sum2{};
    for (int64_t i = 0; i < kSamples; ++i) point += load(y + places[count * i / kSamples], n);
    point = finite_or_zero(point * (1.0f / kSamples));
    for (int64_t begin = 0; begin < count; begin += kTogether) {
      const int64_t end = begin + kTogether < count ? begin + kTogether : count;
      vf part1{}, part2{};
      for (int64_t i = begin; i < end; ++i) {
        const vf distance = load(y + places[i], n) - point;
        part1 += distance;
        part2 += distance * distance;
      }
      sum1 += part1;
      sum2 += part2;
    }
    float* sums = p.sums + first + c;
    store(sums, point, n);
    store(sums + p.channels, sum1, n);
    store(sums + 2 * p.channels, sum2, n);
  });
}

// One copy for both callers: of two, compilers make smaller ones, in which the loop over the tiles is a call.
static __attribute__((noinline)) void any_panel(const GemmConv& p, int64_t panel, int64_t count,
                                                const float* const* rows, int64_t from, int64_t to,
                                                const int64_t* places) {
  with_vectors(panel_vectors(p.channels, panel),
               [&](auto vectors) { gemm_panel<decltype(vectors)::n>(p, panel, count, rows, from, to, places); });
}

// One panel with its bias into sums [pixel][kPanel], kSummed products at a time: those of several taps, or of a part of one.
static void sum_in_blocks(const GemmConv& p, int64_t panel, int64_t count, const float* const* rows,
                          const int64_t* places, float* sums) {
  const int64_t first = panel * kPanel, together = p.depth < kSummed ? kSummed / p.depth : 1;
  GemmConv block = p;
  block.channels = panel_vectors(p.channels, panel) * W;  // whole vectors: there is room for them
  block.weight += first * p.taps * p.depth;
  block.y = sums;
  int64_t tap = 0, from = 0;
  do {  // at least once: the data gradient of a stride has outputs without a tap
    block.taps = p.taps - tap < together ? p.taps - tap : together;
    const int64_t to = p.taps == 0 || p.depth - from < kSummed ? p.depth : from + kSummed;
    const bool last = tap + block.taps == p.taps && to == p.depth;
    block.epilogue = {last && p.epilogue.bias ? p.epilogue.bias + first : nullptr, tap + from > 0 ? sums : nullptr,
                      false};
    any_panel(block, 0, count, rows + tap * count, from, to, places);
    block.weight += block.taps * (to - from) * block.channels;
    from = to == p.depth ? 0 : to;
    if (from == 0) tap += block.taps;
  } while (tap < p.taps);
}

// Replaces rows of T by fp32 copies of them: of all values from the first of them to the last, because rows overlap, or of each
// row by itself where that is less (strides).
template <class T>
static void copy_rows(const GemmConv& p, int64_t count, const void** rows, float* out) {
  const T *low = nullptr, *high = nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = static_cast<const T*>(rows[i]);
    if (rows[i] == p.zeros) continue;
    if (low == nullptr || row < low) low = row;
    if (high == nullptr || row > high) high = row;
  }
  if (low == nullptr) return;
  const int64_t span = high - low + p.depth;
  const bool together = span <= count * p.depth;
  if (together) to_float<T>(low, span, out);
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] == p.zeros) continue;
    float* copy = out + (together ? static_cast<const T*>(rows[i]) - low : i * p.depth);
    if (!together) to_float<T>(rows[i], p.depth, copy);
    rows[i] = copy;
  }
}

// One panel's outputs from its sums [pixel][kPanel]: residual, ReLU, and to T.
template <class T>
static void store_panel(const GemmConv& p, int64_t panel, int64_t count, const float* sums, const int64_t* places) {
  const int64_t first = panel * kPanel, channels = p.channels - first < kPanel ? p.channels - first : kPanel;
  const vf floor = splat(p.epilogue.relu ? 0.0f : -__builtin_inff());
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  T* y = static_cast<T*>(p.y);
  for (int64_t i = 0; i < count; ++i, sums += kPanel) {
    const int64_t place = places[i] + first;
    for_each_vector(channels, [&](int64_t c, auto n) {
      vf z = load(sums + c, n);
      if (residual) z += load(residual + place + c, n);
      store(y + place + c, at_least(floor, z), n);
    });
  }
}

// Other types than fp32 are converted in blocks of pixels that stay in the cache, so the products have one form.
static void gemm_run(const GemmConv& p, int64_t begin, int64_t end, int64_t first, int64_t last, const void** table,
                     float* scratch) {
  const int64_t count = end - begin, plane = p.grid_height * p.grid_width;
  int64_t* places = reinterpret_cast<int64_t*>(table + p.taps * count);
  int64_t image = begin / plane, h = begin % plane / p.grid_width, w = begin % plane % p.grid_width;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y_row = image * p.y_height + h * p.y_step_h + p.y_first_h;
    places[i] = (y_row * p.y_width + w * p.y_step_w + p.y_first_w) * p.y_pixel;
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      const int64_t y = h * p.step_h + p.tap_h[tap], x = w * p.step_w + p.tap_w[tap];
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      const int64_t pixel = (image * p.height + y) * p.width + x;
      table[tap * count + i] = inside ? element(p.x, p.x_dtype, pixel * p.x_pixel) : p.zeros;
    }
    if (++w == p.grid_width) {
      w = 0;
      if (++h == p.grid_height) {
        h = 0;
        ++image;
      }
    }
  }
  if (p.x_dtype != 0) {
    with_storage(p.x_dtype, [&](auto t) { copy_rows<typename decltype(t)::type>(p, p.taps * count, table, scratch); });
    scratch += p.taps * count * p.depth;
  }
  const float* const* rows = reinterpret_cast<const float* const*>(table);
  int64_t* scratch_places = places + count;
  for (int64_t i = 0; i < count; ++i) scratch_places[i] = i * kPanel;
  const bool direct = p.y_dtype == 0 && !gemm_in_blocks(p);
  for (int64_t panel = first; panel < last; ++panel) {
    if (direct) {
      any_panel(p, panel, count, rows, 0, p.depth, places);
    } else {
      sum_in_blocks(p, panel, count, rows, scratch_places, scratch);
    }
    with_storage(p.y_dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      if (!direct) store_panel<T>(p, panel, count, scratch, places);
      if (p.sums) sum_panel<T>(p, panel, count, places);
    });
  }
}

constexpr GemmConvKernels gemm_table = {kPanel, kTileRows, gemm_pack, gemm_run};
