// The weight gradient of conv_backward.h for one instruction set.

// sums[r][v] = sum over k of a[k * a_stride + r] * b[k][v]; then finish(r, v, sum).
template <int NV, class Finish>
FASTRES_INLINE void outer_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, const Finish& finish) {
  vf sums[kTileRows][NV] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_stride, b += NV * W) {
    vf row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const vf value = splat(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r][v] += value * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) finish(r, v, sums[r][v]);
  }
}

// grad[pixel][k] into groups of kTileRows channels: out[group][pixel][kTileRows].
static void pack_gradient(const WeightGradient& p, int64_t begin, int64_t count, float* out) {
  for (int64_t k = 0; k < p.channels; k += kTileRows) {
    const int64_t valid = p.channels - k < kTileRows ? p.channels - k : kTileRows;
    const float* grad = p.grad + begin * p.grad_pixel + k;
    if (valid == kTileRows) {
      for (int64_t i = 0; i < count; ++i, grad += p.grad_pixel, out += kTileRows) {
        __builtin_memcpy(out, grad, kTileRows * sizeof(float));
      }
    } else {
      for (int64_t i = 0; i < count; ++i, grad += p.grad_pixel, out += kTileRows) {
        for (int64_t r = 0; r < kTileRows; ++r) out[r] = r < valid ? grad[r] : 0.0f;
      }
    }
  }
}

template <int NV>
FASTRES_INLINE void weight_gradient_panel(const WeightGradient& p, int64_t tap, int64_t panel, int64_t count,
                                          const float* const* rows, const float* grad, float* packed,
                                          const float*& ahead, int64_t lines, float* out) {
  const int64_t first = panel * kPanel, last_lanes = p.depth - first - (NV - 1) * W;
  vf origin[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) origin[v] = p.origin ? load(p.origin + first + v * W) : vf{};
  for (int64_t i = 0; i < count; ++i) {
    const float* x = rows[i] + first;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const vf values = v == NV - 1 && last_lanes < W ? load(x + v * W, last_lanes) : load(x + v * W);
      store(packed + (i * NV + v) * W, values - origin[v]);
    }
  }
  for (int64_t k = 0; k < p.channels; k += kTileRows) {
    float* to = out + (k * p.taps + tap) * p.depth + first;
    const int64_t valid = p.channels - k;
    for (int64_t i = 0; i < lines; ++i, ahead += 16) __builtin_prefetch(ahead, 0, 2);
    outer_tile<NV>(grad + k * count, kTileRows, packed, count, [&](int r, int v, vf sum) {
      if (r >= valid) return;
      float* place = to + r * p.taps * p.depth + v * W;
      if (v == NV - 1 && last_lanes < W) {
        store(place, load(place, last_lanes) + sum, last_lanes);
      } else {
        store(place, load(place) + sum);
      }
    });
  }
}

static void weight_gradient_run(const WeightGradient& p, int64_t begin, int64_t end, int64_t first, int64_t last,
                                float* scratch, const float** table, float* out) {
  const int64_t count = end - begin, plane = p.grid_height * p.grid_width;
  float* packed = scratch + (p.channels + kTileRows - 1) / kTileRows * kTileRows * count;
  pack_gradient(p, begin, count, scratch);
  // The gradient of the next block is fetched into L2 meanwhile.
  const int64_t tiles = (p.channels + kTileRows - 1) / kTileRows * (last - first) * p.taps;
  const int64_t lines = (count * p.grad_pixel / 16 + tiles - 1) / tiles;
  const float* ahead = p.grad + end * p.grad_pixel;
  for (int64_t tap = 0; tap < p.taps; ++tap) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t image = (begin + i) / plane, pixel = (begin + i) % plane;
      const int64_t y = pixel / p.grid_width * p.step_h + p.tap_h[tap],
                    x = pixel % p.grid_width * p.step_w + p.tap_w[tap];
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      table[i] = inside ? p.x + ((image * p.height + y) * p.width + x) * p.x_pixel : p.zeros;
    }
    for (int64_t panel = first; panel < last; ++panel) {
      with_vectors(panel_vectors(p.depth, panel), [&](auto vectors) {
        weight_gradient_panel<decltype(vectors)::n>(p, tap, panel, count, table, scratch, packed, ahead, lines, out);
      });
    }
  }
}

constexpr WeightGradientKernels weight_gradient_table = {kPanel, kTileRows, weight_gradient_run};
