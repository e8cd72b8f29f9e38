// StemConv of conv.h for one instruction set: Winograd along the rows of 7 taps with stride 2.
//
// Outputs j = 0 .. 3 of a tile are sums of the even pixels e0 .. e6 with the 4 even taps g and of the odd pixels o0 .. o5 with the 3 odd
// taps h: F(4, 4) + F(4, 3). Both are evaluated at p = +-1, +-2, +-1/2, the first also at 0, so they share their products' sums m:
//   with q, q' the squares of the other two points, S = q + q', P = q q':
//   input    even: e6 - S e4 + P e2 +- p (e5 - S e3 + P e1)   at 0: e0 - 5.25 (e2 - e4) - e6
//            odd:  p (o4 - S o2 + P o0) +- (o5 - S o3 + P o1)
//   weight   even: (g0 + p g1 + p^2 g2 + p^3 g3) / D  at 0: g0     D = 2 p^2 (p^2 - q) (p^2 - q')
//            odd:  (h0 + p h1 + p^2 h2) |p| / D
//   output   y_j = sum over p of p^j m_p
// Backwards: the gradient of m_p is the sum over j of p^j grad_y_j; its products with the input are gradients of the transformed weight.
// The error is that of the direct way, because few and small factors occur.

constexpr int kStemPoints = 6;  // and 0
struct StemPoint {
  float s, p;       // S and P
  double d;         // D
  float magnitude;  // |p|
};
constexpr StemPoint kStemPairs[kStemPoints / 2] = {
    {4.25f, 1.0f, -4.5, 1.0f}, {1.25f, 0.25f, 90, 2.0f}, {5.0f, 4.0f, 1.40625, 0.5f}};

// Of each of the taps' rows: values of both phases of all channels at the points, then the even ones at 0.
FASTRES_INLINE int64_t stem_depth(const StemConv& p, int point) {
  return point < kStemPoints ? 2 * p.in_channels : p.in_channels;
}

static bool stem_pack(const StemConv& p, const WeightView& w, int64_t index, float* packed) {
  const int64_t first = index * kPanel, columns = panel_vectors(w.out_channels, index) * W;
  const int64_t valid = w.out_channels - first < columns ? w.out_channels - first : columns;
  float* out = packed + first * stem_weights(p);
  bool finite = true;
  for (int point = 0; point <= kStemPoints; ++point) {
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      for (int64_t depth = 0; depth < stem_depth(p, point); ++depth, out += columns) {
        const bool odd = depth >= p.in_channels;
        const float* taps =
            w.data + tap * w.stride_r + (odd ? depth - p.in_channels : depth) * w.stride_c + odd * w.stride_s;
        for (int64_t k = 0; k < columns; ++k) {
          double sum = 0;
          if (k < valid) {
            const auto g = [&](int s) -> double { return taps[(first + k) * w.stride_k + 2 * s * w.stride_s]; };
            if (point == kStemPoints) {
              sum = g(0);
            } else {
              const StemPoint& pair = kStemPairs[point / 2];
              const double x = point % 2 == 0 ? pair.magnitude : -pair.magnitude;
              sum = odd ? (g(0) + x * (g(1) + x * g(2))) * pair.magnitude / pair.d
                        : (g(0) + x * (g(1) + x * (g(2) + x * g(3)))) / pair.d;
            }
          }
          out[k] = static_cast<float>(sum);
          finite = finite && out[k] - out[k] == 0;
        }
      }
    }
  }
  return finite;
}

// planes[phase][channel][tile] of a row [8 * (tiles + 1) pixels][channel], in lines of stem_line values.
static void stem_transform(const StemConv& p, const float* row, float* planes, float* out) {
  const int64_t channels = p.in_channels, line = stem_line(p.tiles, W);
  for (int64_t t = 0; t <= p.tiles; ++t) {
    for (int64_t i = 0; i < 8 * channels; ++i) planes[i * line + t] = *row++;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < p.tiles; t += W) {
      const auto pixel = [&](int i) { return load(planes + (i % 8 * channels + c) * line + t + i / 8); };
      float* to = out + c * line + t;
      vf e[7], o[6];
#pragma GCC unroll 7
      for (int i = 0; i < 7; ++i) e[i] = pixel(2 * i);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) o[i] = pixel(2 * i + 1);
#pragma GCC unroll 3
      for (int i = 0; i < kStemPoints / 2; ++i) {
        const float s = kStemPairs[i].s, q = kStemPairs[i].p, magnitude = kStemPairs[i].magnitude;
        const vf even = e[6] - s * e[4] + q * e[2], even_odd = magnitude * (e[5] - s * e[3] + q * e[1]);
        const vf odd_even = magnitude * (o[4] - s * o[2] + q * o[0]), odd = o[5] - s * o[3] + q * o[1];
        float *plus = to + 4 * i * channels * line, *minus = plus + 2 * channels * line;
        store(plus, even + even_odd);
        store(plus + channels * line, odd_even + odd);
        store(minus, even - even_odd);
        store(minus + channels * line, odd_even - odd);
      }
      store(to + 2 * kStemPoints * channels * line, e[0] - 5.25f * (e[2] - e[4]) - e[6]);
    }
  }
}

// sums[r][v] = sum over taps and k of rows[tap][k * line + r] * b[tap][k][v]; then finish(r, v, sum).
template <int R, int NV, class Finish>
FASTRES_INLINE void stem_tile(const float* const* rows, int64_t offset, int64_t taps, int64_t depth, int64_t line,
                              const float* b, const Finish& finish) {
  vf sums[R][NV] = {};
  for (int64_t tap = 0; tap < taps; ++tap) {
    const float* a = rows[tap] + offset;
    for (int64_t k = 0; k < depth; ++k, a += line, b += NV * W) {
      vf column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(b + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf value = splat(a[r]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[r][v] += value * column[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) finish(r, v, sums[r][v]);
  }
}

// One panel of an output row. m: [kStemPoints + 1][tiles][columns].
template <int NV>
static vf stem_panel(const StemConv& p, int64_t panel, const float* const* rows, float* m, float* y) {
  const int64_t first = panel * kPanel, line = stem_line(p.tiles, W), plane = p.tiles * NV * W;
  const float* weight = p.weight + first * stem_weights(p);
  for (int point = 0; point <= kStemPoints; ++point) {
    const int64_t depth = stem_depth(p, point), place = 2 * point * p.in_channels * line;
    for_each_tile(p.tiles, [&](int64_t t, int64_t height) {
      const auto keep = [&](int r, int v, vf sum) { store(m + point * plane + ((t + r) * NV + v) * W, sum); };
      static_assert(kTileRows == 6);
      switch (height) {
        case 1: return stem_tile<1, NV>(rows, place + t, p.taps, depth, line, weight, keep);
        case 2: return stem_tile<2, NV>(rows, place + t, p.taps, depth, line, weight, keep);
        case 3: return stem_tile<3, NV>(rows, place + t, p.taps, depth, line, weight, keep);
        case 4: return stem_tile<4, NV>(rows, place + t, p.taps, depth, line, weight, keep);
        case 5: return stem_tile<5, NV>(rows, place + t, p.taps, depth, line, weight, keep);
        default: return stem_tile<6, NV>(rows, place + t, p.taps, depth, line, weight, keep);
      }
    });
    weight += p.taps * depth * NV * W;
  }
  const vf floor = splat(p.relu ? 0.0f : -__builtin_inff());
  vf check{};
  for (int v = 0; v < NV; ++v) {
    const int64_t channel = first + v * W, lanes = p.out_channels - channel < W ? p.out_channels - channel : W;
    const vf bias = p.bias ? load(p.bias + channel) : vf{};
    for (int64_t t = 0; t < p.tiles; ++t) {
      const float* in = m + (t * NV + v) * W;
      vf s[3], d[3], o[4];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const vf plus = load(in + 2 * i * plane), minus = load(in + (2 * i + 1) * plane);
        s[i] = plus + minus;
        d[i] = plus - minus;
      }
      o[0] = load(in + kStemPoints * plane) + s[0] + s[1] + s[2];
      o[1] = d[0] + 2.0f * d[1] + 0.5f * d[2];
      o[2] = s[0] + 4.0f * s[1] + 0.25f * s[2];
      o[3] = d[0] + 8.0f * d[1] + 0.125f * d[2];
      for (int64_t i = 0; i < 4 && 4 * t + i < p.out_width; ++i) {
        check += o[i] * 0.0f;  // NaN if o is not finite
        const vf z = at_least(floor, o[i] + bias);
        float* to = y + (4 * t + i) * p.out_channels + channel;
        if (lanes == W)
          store(to, z);
        else
          store(to, z, lanes);
      }
    }
  }
  return check;
}

// One row of outputs from the transformed rows of its taps. Returns whether all are finite before the bias.
static bool stem_row(const StemConv& p, const float* const* rows, float* m, float* y) {
  vf check{};
  for (int64_t panel = 0; panel * kPanel < p.out_channels; ++panel) {
    with_vectors(panel_vectors(p.out_channels, panel),
                 [&](auto vectors) { check += stem_panel<decltype(vectors)::n>(p, panel, rows, m, y); });
  }
  return all_finite(check);
}

// The values p^j grad_y_j of all tiles of a row, at all points: m [point][tiles][columns].
template <int NV>
static void stem_transform_gradient(const StemConv& p, int64_t first, const float* grad, float* m) {
  const int64_t plane = p.tiles * NV * W;
  for (int v = 0; v < NV; ++v) {
    const int64_t channel = first + v * W, lanes = p.out_channels - channel < W ? p.out_channels - channel : W;
    for (int64_t t = 0; t < p.tiles; ++t) {
      vf g[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float* from = grad + (4 * t + i) * p.out_channels + channel;
        g[i] = 4 * t + i >= p.out_width ? vf{} : lanes == W ? load(from) : load(from, lanes);
      }
      float* to = m + (t * NV + v) * W;
#pragma GCC unroll 3
      for (int i = 0; i < kStemPoints / 2; ++i) {
        const float x = kStemPairs[i].magnitude;
        const vf even = g[0] + x * x * g[2], odd = x * (g[1] + x * x * g[3]);
        store(to + 2 * i * plane, even + odd);
        store(to + (2 * i + 1) * plane, even - odd);
      }
      store(to + kStemPoints * plane, g[0]);
    }
  }
}

// sums, in the places of the packed weight, plus what a row of grad adds to them.
static void stem_gradient(const StemConv& p, const float* const* rows, const float* grad, float* m, float* sums) {
  const int64_t line = stem_line(p.tiles, W);
  for (int64_t first = 0; first < p.out_channels; first += kPanel) {
    with_vectors(panel_vectors(p.out_channels, first / kPanel), [&](auto vectors) {
      constexpr int NV = decltype(vectors)::n;
      stem_transform_gradient<NV>(p, first, grad, m);
      float* to = sums + first * stem_weights(p);
      for (int point = 0; point <= kStemPoints; ++point) {
        for (int64_t tap = 0; tap < p.taps; ++tap) {
          const float* values = rows[tap] + 2 * point * p.in_channels * line;
          for_each_tile(stem_depth(p, point), [&](int64_t k, int64_t height) {
            const float* lines[kTileRows];
            for (int r = 0; r < height; ++r) lines[r] = values + (k + r) * line;
            tile_of_rows<NV>(height, lines, 0, 1, 0, p.tiles, m + point * p.tiles * NV * W, [&](int r, int v, vf sum) {
              float* place = to + ((k + r) * NV + v) * W;
              store(place, load(place) + sum);
            });
          });
          to += stem_depth(p, point) * NV * W;
        }
      }
    });
  }
}

// weight [out_channels][taps][7][in_channels] of one panel, from sums that stem_gradient left in `parts` buffers. Returns whether it is finite.
static bool stem_finish(const StemConv& p, int64_t index, const float* const* sums, int64_t parts, float* weight) {
  const int64_t first = index * kPanel, columns = panel_vectors(p.out_channels, index) * W, channels = p.in_channels;
  const int64_t last = p.out_channels - first < columns ? p.out_channels : first + columns;
  bool finite = true;
  for (int64_t k = first; k < last; ++k) {
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      for (int64_t depth = 0; depth < 2 * channels; ++depth) {
        const bool odd = depth >= channels;
        double taps[4] = {};
        for (int point = 0; point < kStemPoints + !odd; ++point) {
          const int64_t row = (2 * point * p.taps + (point < kStemPoints ? 2 : 1) * tap) * channels + depth;
          double sum = 0;
          for (int64_t part = 0; part < parts; ++part) {
            sum += sums[part][first * stem_weights(p) + row * columns + k - first];
          }
          if (point == kStemPoints) {
            taps[0] += sum;
            continue;
          }
          const StemPoint& pair = kStemPairs[point / 2];
          const double x = point % 2 == 0 ? pair.magnitude : -pair.magnitude;
          sum *= (odd ? pair.magnitude : 1) / pair.d;
          for (int s = 0; s < 4; ++s, sum *= x) taps[s] += sum;
        }
        for (int s = 0; s < 4 - odd; ++s) {
          const float value = static_cast<float>(taps[s]);
          weight[((k * p.taps + tap) * 7 + 2 * s + odd) * channels + depth % channels] = value;
          finite = finite && value - value == 0;
        }
      }
    }
  }
  return finite;
}

constexpr StemKernels stem_table = {kPanel, W, stem_pack, stem_transform, stem_row, stem_gradient, stem_finish};
