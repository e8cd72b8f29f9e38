// bn_act_maxpool and its backward: the normalised activation is never written.
//
// Backward collects the gradient of a pixel from the windows over it whose byte says that the pixel was their maximum: once
// to reduce and once to apply, which costs a quarter of writing it and reading it again.
#include "reduce.cuh"

namespace fastres::cuda {
namespace {

constexpr int kBlocks = 8;    // of a multiprocessor
constexpr int kTogether = 3;  // columns of a window that are loaded at once

// Row and column of a pixel, and its image.
struct Pixel {
  int64_t image;
  int row, column;
};

// That of a place in images of `width` columns.
template <bool kChannelsLast>
__device__ Pixel pixel_of(const View& view, const Place& place, int64_t width) {
  int64_t image = place.image;
  if (kChannelsLast) image = quotient(place.pixel, view.pixels);
  const uint32_t pixel = static_cast<uint32_t>(kChannelsLast ? place.pixel - image * view.pixels : place.pixel);
  const uint32_t row = pixel / static_cast<uint32_t>(width);
  return {image, static_cast<int>(row), static_cast<int>(pixel - row * static_cast<uint32_t>(width))};
}

// Pixels of an image are counted in 32 bits.
bool fits(const Window& window) {
  return window.height * window.width <= INT32_MAX && window.out_height * window.out_width <= INT32_MAX;
}

// Offset of [image, channel, row, column] among images of `pixels` pixels.
template <bool kChannelsLast>
__device__ int64_t offset_of(int64_t image, int64_t channel, int64_t channels, int64_t pixels, int64_t pixel) {
  return kChannelsLast ? (image * pixels + pixel) * channels + channel : (image * channels + channel) * pixels + pixel;
}

// kWidth bytes of an index.
template <int kWidth>
struct Bytes {
  uint8_t values[kWidth];
  __device__ static Bytes load(const uint8_t* p) {
    Bytes bytes;
    if constexpr (kWidth == 1) {
      bytes.values[0] = *p;
    } else {
      const uint2 raw = *reinterpret_cast<const uint2*>(p);
      memcpy(&bytes, &raw, sizeof raw);
    }
    return bytes;
  }
  __device__ void store(uint8_t* p) const {
    if constexpr (kWidth == 1) {
      *p = values[0];
    } else {
      uint2 raw;
      memcpy(&raw, this, sizeof raw);
      *reinterpret_cast<uint2*>(p) = raw;
    }
  }
};

// The view is of the pooled output.
template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident) maxpool_kernel(View view, Window window, Norm norm, Pool args) {
  FASTRES_SHARED(NormShared, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, norm, shared, args.used_mean, args.used_var);
  const T* x = static_cast<const T*>(args.x);
  const int height = static_cast<int>(window.height), width = static_cast<int>(window.width);
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += gridDim.y) {
    const Place place = walk.at(tile);
    if (!place.exists) continue;
    const Pixel out = pixel_of<kChannelsLast>(view, place, window.out_width);
    const int top = out.row * window.stride - window.padding, left = out.column * window.stride - window.padding;
    float best[kWidth];
    unsigned where[kWidth];
    const int first = (top < 0 ? -top : 0) * window.kernel + (left < 0 ? -left : 0);
    for (int i = 0; i < kWidth; ++i) best[i] = -INFINITY, where[i] = first;
    for (int r = 0; r < window.kernel; ++r) {
      if (top + r < 0 || top + r >= height) continue;
      for (int start = 0; start < window.kernel; start += kTogether) {
        Pack<T, kWidth> packs[kTogether];
        bool exists[kTogether];
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
          const int column = left + start + c;
          exists[c] = start + c < window.kernel && column >= 0 && column < width;
          if (!exists[c]) continue;
          const int64_t pixel = static_cast<int64_t>(top + r) * width + column;
          packs[c] = load<kWidth>(x + offset_of<kChannelsLast>(out.image, walk.channel, view.channels,
                                                               window.height * window.width, pixel));
        }
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
          if (!exists[c]) continue;
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            float z = normalise(packs[c][i], i);
            if (args.relu && z <= 0.0f) z = 0.0f;
            if (z > best[i] || isnan(z)) best[i] = z, where[i] = r * window.kernel + start + c;
          }
        }
      }
    }
    store(static_cast<T*>(args.y) + place.offset, best);
    Bytes<kWidth> bytes;
    for (int i = 0; i < kWidth; ++i) bytes.values[i] = static_cast<uint8_t>(where[i]);
    bytes.store(args.index + place.offset);
  }
}

// The gradient of a pixel: of the windows over it those that it is the maximum of.
template <class T, class W, bool kChannelsLast, int kWidth>
__device__ void pooled_gradient(const W& walk, const Window& window, const T* grad, const uint8_t* index,
                                const Place& place, float (&g)[kWidth]) {
  const View& view = walk.view;
  const Pixel at = pixel_of<kChannelsLast>(view, place, window.width);
  const int last_row = (at.row + window.padding) / window.stride,
            last_column = (at.column + window.padding) / window.stride;
  for (int i = 0; i < kWidth; ++i) g[i] = 0.0f;
  for (int row = last_row; row >= 0; --row) {
    const int down = at.row + window.padding - row * window.stride;
    if (down >= window.kernel) break;
    if (row >= window.out_height) continue;
    for (int column = last_column; column >= 0; --column) {
      const int right = at.column + window.padding - column * window.stride;
      if (right >= window.kernel) break;
      if (column >= window.out_width) continue;
      const int64_t out =
          offset_of<kChannelsLast>(at.image, walk.channel, view.channels, window.out_height * window.out_width,
                                   static_cast<int64_t>(row) * window.out_width + column);
      const Bytes<kWidth> chosen = Bytes<kWidth>::load(index + out);
      const Pack<T, kWidth> pack = load<kWidth>(grad + out);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[i] += chosen.values[i] == down * window.kernel + right ? pack[i] : 0.0f;
    }
  }
}

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    maxpool_backward_reduce_kernel(View view, Window window, Norm norm, Gradient gradient, const uint8_t* index,
                                   Reduced reduced, Workspace work) {
  FASTRES_SHARED(NormShared, norm_shared);
  FASTRES_SHARED(SumsShared<2>, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, norm, norm_shared);
  const T *grad = static_cast<const T*>(gradient.grad_y), *x = static_cast<const T*>(gradient.x);
  float sums[2][W::kOwn] = {};  // of g and of g * (x - near)
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += gridDim.y) {
    const Place place = walk.at(tile);
    if (!place.exists) continue;
    const Pack<T, kWidth> values = load<kWidth>(x + place.offset);
    float g[kWidth];
    pooled_gradient<T, W, kChannelsLast, kWidth>(walk, window, grad, index, place, g);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int k = W::own(i);
      if (gradient.relu == Relu::kRecomputed && normalise(values[i], i) <= 0.0f) g[i] = 0.0f;
      sums[0][k] += g[i];
      sums[1][k] = fmaf(g[i], values[i] - normalise.near[k], sums[1][k]);
    }
  }
  reduce(walk, sums, work, shared, [&](int64_t channel, const double (&totals)[2]) {
    finish_gradient(norm, reduced, gradient.training, view.channels, view.count(), channel, totals[0], totals[1]);
  });
}

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    maxpool_backward_apply_kernel(View view, Window window, Norm norm, Gradient gradient, const uint8_t* index,
                                  const float* factors, T* grad_x) {
  FASTRES_SHARED(NormShared, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, norm, shared);
  const Factors<W> factor(walk, factors, normalise);
  const T *grad = static_cast<const T*>(gradient.grad_y), *x = static_cast<const T*>(gradient.x);
  for (int64_t turn = blockIdx.y; turn < view.tiles; turn += gridDim.y) {
    const Place place = walk.at(view.tiles - 1 - turn);
    if (!place.exists) continue;
    const Pack<T, kWidth> values = load<kWidth>(x + place.offset);
    float g[kWidth];
    pooled_gradient<T, W, kChannelsLast, kWidth>(walk, window, grad, index, place, g);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (gradient.relu == Relu::kRecomputed && normalise(values[i], i) <= 0.0f) g[i] = 0.0f;
      g[i] = factor(g[i], values[i] - normalise.near[W::own(i)], gradient.training, i);
    }
    store(grad_x + place.offset, g);
  }
}

}  // namespace

cudaError_t maxpool(const Shape& shape, const Window& window, const Norm& norm, const Pool& args, const Queue& queue) {
  if (!fits(window)) return cudaErrorInvalidValue;
  Shape pooled = shape;
  pooled.pixels = window.out_height * window.out_width;
  // Windows of neighbouring pixels do not start where 16 bytes do: in NCHW one value at a time.
  const bool wide = shape.channels_last && aligned(args.x, args.y, args.index);
  return with_view(
      pooled, wide, queue, kBlocks, [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
        using T = typename decltype(type)::type;
        constexpr int kWidth = channels_last.value ? width.value : 1;
        return launch(maxpool_kernel<T, channels_last.value, kWidth>, grid, queue, view, window, norm, args);
      });
}

cudaError_t maxpool_backward_reduce(const Shape& shape, const Window& window, const Norm& norm,
                                    const Gradient& gradient, const uint8_t* index, const Reduced& reduced,
                                    const Workspace& work, const Queue& queue) {
  if (!fits(window)) return cudaErrorInvalidValue;
  const bool wide = shape.channels_last && aligned(gradient.grad_y, gradient.x, index);
  return with_view(shape, wide, queue, kReduceBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     constexpr int kWidth = channels_last.value ? width.value : 1;
                     return launch(maxpool_backward_reduce_kernel<T, channels_last.value, kWidth>, grid, queue, view,
                                   window, norm, gradient, index, reduced, work);
                   });
}

cudaError_t maxpool_backward_apply(const Shape& shape, const Window& window, const Norm& norm, const Gradient& gradient,
                                   const uint8_t* index, const float* factors, void* grad_x, const Queue& queue) {
  if (!fits(window)) return cudaErrorInvalidValue;
  const bool wide = shape.channels_last && aligned(gradient.grad_y, gradient.x, index, grad_x);
  return with_view(shape, wide, queue, kBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     constexpr int kWidth = channels_last.value ? width.value : 1;
                     return launch(maxpool_backward_apply_kernel<T, channels_last.value, kWidth>, grid, queue, view,
                                   window, norm, gradient, index, factors, static_cast<T*>(grad_x));
                   });
}

}  // namespace fastres::cuda
