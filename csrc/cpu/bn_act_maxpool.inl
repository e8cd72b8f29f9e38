// Batch norm + ReLU + max-pooling of bn_act.h for one instruction set: the normalised activation is never stored.
// Ties and NaN as in ATen's max_pool2d: the first maximum of a window wins, and a NaN always does.
#include "reduce.inl"

FASTRES_INLINE vi load_index(const uint8_t* p, int64_t n) {
  uint8_t buffer[W] = {};
  __builtin_memcpy(buffer, p, n);
  vb bytes;
  __builtin_memcpy(&bytes, buffer, sizeof bytes);
  return __builtin_convertvector(bytes, vi);
}
FASTRES_INLINE void store_index(uint8_t* p, vi index, int64_t n) {
  const vb bytes = __builtin_convertvector(index, vb);
  __builtin_memcpy(p, &bytes, n);
}

// Windows that cover input position h (or w) along one axis: [first, last].
struct Windows {
  int64_t first, last;
};
FASTRES_INLINE Windows windows_over(int64_t position, int64_t outputs, const BnActPool& p) {
  const int64_t shifted = position + p.padding;
  const int64_t first = shifted < p.kernel ? 0 : (shifted - p.kernel) / p.stride + 1;
  const int64_t last = shifted / p.stride;
  return {first, last < outputs ? last : outputs - 1};
}
// Input positions of window `out` along one axis: [first, last), clipped to the image.
FASTRES_INLINE Windows positions_of(int64_t out, int64_t size, const BnActPool& p) {
  const int64_t start = out * p.stride - p.padding, end = start + p.kernel;
  return {start < 0 ? 0 : start, end < size ? end : size};
}

template <class T>
void pool_forward_channels_last(const BnActPool& p, int64_t begin, int64_t end) {
  const vf floor = splat(p.relu ? 0.0f : -__builtin_inff());
  for (int64_t out_row = begin; out_row < end; ++out_row) {
    const int64_t image = out_row / p.out_height, oh = out_row % p.out_height;
    const T* x = static_cast<const T*>(p.x) + image * p.height * p.width * p.channels;
    const Windows rows = positions_of(oh, p.height, p);
    for (int64_t ow = 0; ow < p.out_width; ++ow) {
      const Windows columns = positions_of(ow, p.width, p);
      const int64_t out = (out_row * p.out_width + ow) * p.channels;
      const int64_t corner = (oh * p.stride - p.padding) * p.kernel + (ow * p.stride - p.padding);
      const int first = static_cast<int>(rows.first * p.kernel + columns.first - corner);
      for_each_vector(p.channels, [&](int64_t i, auto n) {
        const vf mean = load(p.mean + i), scale = load(p.scale + i), shift = load(p.shift + i);
        vf best = splat(-__builtin_inff());
        vi index = splat(first);
        for (int64_t h = rows.first; h < rows.last; ++h) {
          for (int64_t w = columns.first; w < columns.last; ++w) {
            const vf z = (load(x + (h * p.width + w) * p.channels + i, n) - mean) * scale + shift;
            const vf value = select(z < floor, floor, z);
            const vi better = (value > best) | (value != value);
            best = select(better, value, best);
            const vi here = splat(static_cast<int32_t>(h * p.kernel + w - corner));
            index = (here & better) | (index & ~better);
          }
        }
        store(static_cast<T*>(p.y) + out + i, best, n);
        store_index(p.index + out + i, index, n.n);
      });
    }
  }
}

template <class T>
FASTRES_INLINE float value_of(const T* p) {
  return load(p, 1)[0];
}

template <class T>
void pool_forward_contiguous(const BnActPool& p, int64_t begin, int64_t end) {
  const float floor = p.relu ? 0.0f : -__builtin_inff();
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t channel = plane % p.channels;
    const float mean = p.mean[channel], scale = p.scale[channel], shift = p.shift[channel];
    const T* x = static_cast<const T*>(p.x) + plane * p.height * p.width;
    for (int64_t oh = 0; oh < p.out_height; ++oh) {
      const Windows rows = positions_of(oh, p.height, p);
      for (int64_t ow = 0; ow < p.out_width; ++ow) {
        const Windows columns = positions_of(ow, p.width, p);
        const int64_t corner = (oh * p.stride - p.padding) * p.kernel + (ow * p.stride - p.padding);
        float best = -__builtin_inff();
        int64_t index = rows.first * p.kernel + columns.first - corner;
        for (int64_t h = rows.first; h < rows.last; ++h) {
          for (int64_t w = columns.first; w < columns.last; ++w) {
            const float z = (value_of(x + h * p.width + w) - mean) * scale + shift;
            const float value = z < floor ? floor : z;
            if (value > best || value != value) {
              best = value;
              index = h * p.kernel + w - corner;
            }
          }
        }
        const int64_t out = (plane * p.out_height + oh) * p.out_width + ow;
        store(static_cast<T*>(p.y) + out, splat(best), 1);
        p.index[out] = static_cast<uint8_t>(index);
      }
    }
  }
}

template <class T, bool kChannelsLast>
FASTRES_INLINE vf keep_active(const BnActPool& p, int64_t channel, int64_t i, vf centred, vf grad) {
  if (!p.relu) return grad;
  const vf z = centred * parameter<kChannelsLast>(p.scale, channel, i) + parameter<kChannelsLast>(p.shift, channel, i);
  return select(~(z <= 0.0f), grad, vf{});
}

// The gradient of one pixel: what the windows that chose it send back. At most kMaxWindows windows cover a pixel.
constexpr int kMaxWindows = 16;

template <class T>
struct PoolSourceChannelsLast {
  struct Row {
    const T* x;
    int count;
    const T* grad_y[kMaxWindows];
    const uint8_t* index[kMaxWindows];
    int32_t code[kMaxWindows];
  };
  const BnActPool& p;
  FASTRES_INLINE_MEMBER Row row(int64_t pixel) const {
    Row row;
    row.x = static_cast<const T*>(p.x) + pixel * p.channels;
    row.count = 0;
    const int64_t w = pixel % p.width, h = pixel / p.width % p.height, image = pixel / (p.width * p.height);
    const Windows rows = windows_over(h, p.out_height, p), columns = windows_over(w, p.out_width, p);
    for (int64_t oh = rows.first; oh <= rows.last; ++oh) {
      for (int64_t ow = columns.first; ow <= columns.last; ++ow) {
        const int64_t out = ((image * p.out_height + oh) * p.out_width + ow) * p.channels;
        row.grad_y[row.count] = static_cast<const T*>(p.grad_y) + out;
        row.index[row.count] = p.index + out;
        row.code[row.count] =
            static_cast<int32_t>((h + p.padding - oh * p.stride) * p.kernel + (w + p.padding - ow * p.stride));
        ++row.count;
      }
    }
    return row;
  }
  template <class N>
  FASTRES_INLINE_MEMBER vf gradient(const Row& row, int64_t channel, int64_t i, N n, vf centred) const {
    vf grad{};
    for (int k = 0; k < row.count; ++k) {
      const vi chosen = load_index(row.index[k] + i, n.n) == splat(row.code[k]);
      grad += select(chosen, load(row.grad_y[k] + i, n), vf{});
    }
    return keep_active<T, true>(p, channel, i, centred, grad);
  }
  template <class N>
  FASTRES_INLINE_MEMBER void terms(const Row& row, int64_t channel, int64_t i, N n, vf* a, vf* b) const {
    const vf centred = load(row.x + i, n) - load(p.mean + i);
    *a = gradient(row, channel, i, n, centred);
    *b = *a * centred;
  }
};

template <class T>
struct PoolSourceContiguous {
  struct Row {
    const T *x, *grad_y;
    const uint8_t* index;
  };
  const BnActPool& p;
  FASTRES_INLINE_MEMBER Row row(int64_t plane) const {
    const int64_t out = plane * p.out_height * p.out_width;
    return {static_cast<const T*>(p.x) + plane * p.height * p.width, static_cast<const T*>(p.grad_y) + out,
            p.index + out};
  }
  template <class N>
  FASTRES_INLINE_MEMBER vf gradient(const Row& row, int64_t channel, int64_t i, N n, vf centred) const {
    float grad[W] = {};
    for (int64_t lane = 0; lane < n.n; ++lane) {
      const int64_t h = (i + lane) / p.width, w = (i + lane) % p.width;
      const Windows rows = windows_over(h, p.out_height, p), columns = windows_over(w, p.out_width, p);
      for (int64_t oh = rows.first; oh <= rows.last; ++oh) {
        for (int64_t ow = columns.first; ow <= columns.last; ++ow) {
          const int64_t code = (h + p.padding - oh * p.stride) * p.kernel + (w + p.padding - ow * p.stride);
          const int64_t out = oh * p.out_width + ow;
          if (row.index[out] == code) grad[lane] += value_of(row.grad_y + out);
        }
      }
    }
    return keep_active<T, false>(p, channel, i, centred, load(grad));
  }
  template <class N>
  FASTRES_INLINE_MEMBER void terms(const Row& row, int64_t channel, int64_t i, N n, vf* a, vf* b) const {
    const vf centred = load(row.x + i, n) - splat(p.mean[channel]);
    *a = gradient(row, channel, i, n, centred);
    *b = *a * centred;
    if (n.n < W) *b = select(first_lanes(n.n), *b, vf{});
  }
};

template <class T>
void pool_reduce_channels_last(const BnActPool& p, int64_t begin, int64_t end, double* sum1, double* sum2) {
  reduce_channels_last(PoolSourceChannelsLast<T>{p}, p.channels, begin, end, sum1, sum2);
}
template <class T>
void pool_reduce_contiguous(const BnActPool& p, int64_t begin, int64_t end, double* sum1, double* sum2) {
  reduce_contiguous(PoolSourceContiguous<T>{p}, p.images, p.channels, p.height * p.width, begin, end, sum1, sum2);
}

template <class T, bool kChannelsLast, class Source>
void pool_backward_apply(const BnActPool& p, int64_t begin, int64_t end) {
  const Source source{p};
  const int64_t length = kChannelsLast ? p.channels : p.height * p.width;
  for (int64_t run = begin; run < end; ++run) {
    const auto row = source.row(run);
    T* grad_x = static_cast<T*>(p.y) + run * length;
    const int64_t channel = kChannelsLast ? 0 : run % p.channels;
    for_each_vector(length, [&](int64_t i, auto n) {
      const vf centred = load(row.x + i, n) - parameter<kChannelsLast>(p.mean, channel, i);
      const vf g = source.gradient(row, channel, i, n, centred);
      store(grad_x + i, input_gradient<kChannelsLast>(p, channel, i, centred, g), n);
    });
  }
}

template <class T>
constexpr BnActPoolKernels contiguous_kernels() {
  return {pool_forward_contiguous<T>, pool_reduce_contiguous<T>,
          pool_backward_apply<T, false, PoolSourceContiguous<T>>};
}
template <class T>
constexpr BnActPoolKernels channels_last_kernels() {
  return {pool_forward_channels_last<T>, pool_reduce_channels_last<T>,
          pool_backward_apply<T, true, PoolSourceChannelsLast<T>>};
}
constexpr BnActPoolKernels bn_act_pool_table[3][2] = {{contiguous_kernels<float>(), channels_last_kernels<float>()},
                                                      {contiguous_kernels<BF16>(), channels_last_kernels<BF16>()},
                                                      {contiguous_kernels<F16>(), channels_last_kernels<F16>()}};
