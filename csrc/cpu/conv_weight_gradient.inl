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
static void pack_gradient(int64_t channels, const float* grad, int64_t grad_pixel, int64_t count, float* out) {
  for (int64_t k = 0; k < channels; k += kTileRows) {
    const int64_t valid = channels - k < kTileRows ? channels - k : kTileRows;
    const float* from = grad + k;
    if (valid == kTileRows) {
      for (int64_t i = 0; i < count; ++i, from += grad_pixel, out += kTileRows) {
        __builtin_memcpy(out, from, kTileRows * sizeof(float));
      }
    } else {
      for (int64_t i = 0; i < count; ++i, from += grad_pixel, out += kTileRows) {
        for (int64_t r = 0; r < kTileRows; ++r) out[r] = r < valid ? from[r] : 0.0f;
      }
    }
  }
}

// Values first .. first + vectors * W of each row, less the origin: packed[row][vector]. The last vector has last_lanes values.
template <class T>
static void pack_rows(const void* const* rows, int64_t first, int64_t count, int64_t vectors, int64_t last_lanes,
                      const float* origin, float* packed) {
  for (int64_t i = 0; i < count; ++i) {
    const T* x = static_cast<const T*>(rows[i]) + first;
    for (int64_t v = 0; v < vectors; ++v, packed += W) {
      const vf values = v == vectors - 1 && last_lanes < W ? load(x + v * W, last_lanes) : load(x + v * W);
      store(packed, origin ? values - load(origin + first + v * W) : values);
    }
  }
}

template <int NV>
FASTRES_INLINE void weight_gradient_panel(const WeightGradient& p, int64_t tap, int64_t panel, int64_t count,
                                          const void* const* rows, const float* grad, float* packed, const char*& ahead,
                                          int64_t lines, float* out) {
  const int64_t first = panel * kPanel, last_lanes = p.depth - first - (NV - 1) * W;
  with_storage(p.x_dtype, [&](auto stored) {
    pack_rows<typename decltype(stored)::type>(rows, first, count, NV, last_lanes, p.origin, packed);
  });
  for (int64_t k = 0; k < p.channels; k += kTileRows) {
    float* to = out + (k * p.taps + tap) * p.depth + first;
    const int64_t valid = p.channels - k;
    for (int64_t i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
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
                                float* scratch, const void** table, float* out) {
  const int64_t count = end - begin, plane = p.grid_height * p.grid_width;
  float* packed = scratch + (p.channels + kTileRows - 1) / kTileRows * kTileRows * count;
  const void* grad = element(p.grad, p.grad_dtype, begin * p.grad_pixel);
  if (p.grad_dtype == 0) {
    pack_gradient(p.channels, static_cast<const float*>(grad), p.grad_pixel, count, scratch);
  } else {
    float* copy = packed + count * kPanel;
    for (int64_t i = 0; i < count; ++i) {
      to_float_table[p.grad_dtype](element(grad, p.grad_dtype, i * p.grad_pixel), p.channels, copy + i * p.channels);
    }
    pack_gradient(p.channels, copy, p.channels, count, scratch);
  }
  // The gradient of the next block is fetched into L2 meanwhile.
  const char* ahead = static_cast<const char*>(element(p.grad, p.grad_dtype, end * p.grad_pixel));
  const int64_t tiles = (p.channels + kTileRows - 1) / kTileRows * (last - first) * p.taps;
  const int64_t bytes =
      static_cast<const char*>(element(grad, p.grad_dtype, count * p.grad_pixel)) - static_cast<const char*>(grad);
  const int64_t lines = (bytes / 64 + tiles - 1) / tiles;
  for (int64_t tap = 0; tap < p.taps; ++tap) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t image = (begin + i) / plane, pixel = (begin + i) % plane;
      const int64_t y = pixel / p.grid_width * p.step_h + p.tap_h[tap],
                    x = pixel % p.grid_width * p.step_w + p.tap_w[tap];
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      table[i] = inside ? element(p.x, p.x_dtype, ((image * p.height + y) * p.width + x) * p.x_pixel) : p.zeros;
    }
    for (int64_t panel = first; panel < last; ++panel) {
      with_vectors(panel_vectors(p.depth, panel), [&](auto vectors) {
        weight_gradient_panel<decltype(vectors)::n>(p, tap, panel, count, table, scratch, packed, ahead, lines, out);
      });
    }
  }
}

constexpr WeightGradientKernels weight_gradient_table = {kPanel, kTileRows, weight_gradient_run};
