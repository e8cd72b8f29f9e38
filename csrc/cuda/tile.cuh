// How blocks walk over an activation, and the values a channel that they need.
//
// Every thread has kWidth values that lie next to each other: kWide where all rows are a multiple of that, else 1.
//   channels_last  a tile is kThreads / lanes rows of lanes * kWidth channels: a thread keeps its channels, and what belongs
//                  to them, in registers
//   else           a tile is 8 segments, one a warp, of kWarp * kWidth pixels; a block has one channel
// blockIdx.x chooses the channels, and blockIdx.y of gridDim.y every gridDim.y-th tile.
#pragma once

#include "device.cuh"

namespace fastres::cuda {

// An activation as kernels see it.
struct View {
  int64_t images, channels, pixels, tiles;
  uint32_t segments;  // of a row; not in channels_last. Those of all images are counted in 32 bits
  int lanes;          // threads side by side on channels; 1 if not channels_last
  __host__ __device__ int64_t count() const { return images * pixels; }
};

struct Place {
  int64_t offset, byte;  // of the thread's first value, and of its mask
  bool exists;
  int64_t image, pixel;  // in channels_last: 0, and the pixel of all images
};

template <bool kChannelsLast, int kWidth>
struct Walk {
  static constexpr int kOwn = kChannelsLast ? kWidth : 1;  // channels of a thread
  View view;
  int lane, row;    // of the thread in its tile
  int64_t first;    // channel of the block
  int64_t channel;  // of the thread

  __device__ explicit Walk(const View& v) : view(v) {
    lane = static_cast<int>(threadIdx.x) & (v.lanes - 1);
    row = static_cast<int>(threadIdx.x) / v.lanes;
    first = static_cast<int64_t>(blockIdx.x) * channels();
    channel = first + lane * kOwn;
  }
  __device__ int channels() const { return view.lanes * kOwn; }  // of the block
  __device__ bool has(int i) const { return first + i < view.channels; }
  // Where values i and i + 1 of a thread belong to different channels, they have sums and coefficients of their own.
  __device__ static constexpr int own(int i) { return kChannelsLast ? i : 0; }

  __device__ Place at(int64_t tile) const {
    if constexpr (kChannelsLast) {
      const int64_t r = tile * (kThreads / view.lanes) + row;
      return {r * view.channels + channel, r * divide_up(view.channels, 8) + channel / 8,
              r < view.count() && channel < view.channels, 0, r};
    } else {
      const uint32_t item = static_cast<uint32_t>(tile) * (kThreads / kWarp) + threadIdx.x / kWarp;
      const int64_t image = item / view.segments;
      const int64_t pixel = (static_cast<int64_t>(item % view.segments) * kWarp + threadIdx.x % kWarp) * kWidth;
      const int64_t run = image * view.channels + channel;
      return {run * view.pixels + pixel, run * divide_up(view.pixels, 8) + pixel / 8,
              image < view.images && pixel < view.pixels, image, pixel};
    }
  }
};

// How a launch cuts an activation. groups: of channels, one for each blockIdx.x.
struct Cut {
  View view;
  int64_t groups;
  int width;  // values of a thread
};

inline cudaError_t cut(const Shape& shape, bool wide, Cut* out) {
  View view{shape.images, shape.channels, shape.pixels, 0, 0, 1};
  if (view.count() <= 0 || shape.channels <= 0) return cudaErrorInvalidValue;
  const int64_t row = shape.channels_last ? shape.channels : shape.pixels;
  const int width = wide && row % kWide == 0 ? kWide : 1;
  int64_t groups = shape.channels;
  if (shape.channels_last) {
    // A warp that writes a mask value by value has 32 channels of one row.
    view.lanes = width == 1 ? kWarp : 1;
    while (view.lanes < kWarp && view.lanes * width < shape.channels) view.lanes *= 2;
    groups = divide_up(shape.channels, view.lanes * width);
    view.tiles = divide_up(view.count(), kThreads / view.lanes);
  } else {
    const int64_t segments = divide_up(shape.pixels, kWarp * width);
    if (segments > INT32_MAX || shape.images > INT32_MAX / segments) return cudaErrorInvalidValue;
    view.segments = static_cast<uint32_t>(segments);
    view.tiles = divide_up(shape.images * segments, kThreads / kWarp);
  }
  *out = {view, groups, width};
  return cudaSuccess;
}

// f(Type<T>, constant<channels_last>, constant<width>, view, grid), with at most so many blocks for each multiprocessor, but
// one for each group of channels.
template <class F>
cudaError_t with_view(const Shape& shape, bool wide, const Queue& queue, int blocks, const F& f) {
  Cut found;
  if (const cudaError_t error = cut(shape, wide, &found); error != cudaSuccess) return error;
  const View& view = found.view;
  int64_t splits = divide_up(static_cast<int64_t>(blocks) * queue.multiprocessors, found.groups);
  splits = splits < view.tiles ? splits : view.tiles;
  const dim3 grid(static_cast<unsigned>(found.groups), static_cast<unsigned>(splits < 65535 ? splits : 65535));
  return with_dtype(shape.dtype, [&](auto type) {
    if (shape.channels_last) {
      if (found.width == 1) return f(type, std::true_type{}, std::integral_constant<int, 1>{}, view, grid);
      return f(type, std::true_type{}, std::integral_constant<int, kWide>{}, view, grid);
    }
    if (found.width == 1) return f(type, std::false_type{}, std::integral_constant<int, 1>{}, view, grid);
    return f(type, std::false_type{}, std::integral_constant<int, kWide>{}, view, grid);
  });
}

constexpr int kMostChannels = kWarp * kWide;  // of a block

struct Coefficients {
  float near, scale, shift;
  double inverse, mean;  // 1 / sqrt(var + eps)
};

// See kernels.h.
__device__ inline Coefficients coefficients(const Norm& norm, int64_t channel) {
  const double mean = value_of(norm.mean, channel);
  const double inverse = 1.0 / sqrt(value_of(norm.var, channel) + norm.eps);
  const double scale = norm.weight.data ? inverse * value_of(norm.weight, channel) : inverse;
  const float near = static_cast<float>(mean);
  const double rest = isfinite(mean) ? near - mean : 0.0;
  const double shift = rest * scale + (norm.bias.data ? value_of(norm.bias, channel) : 0.0);
  return {near, static_cast<float>(scale), static_cast<float>(shift), inverse, mean};
}

struct NormShared {
  float near[kMostChannels], scale[kMostChannels], shift[kMostChannels];
};

// The coefficients of a thread's channels. One thread computes those of a channel, all of the block read them.
template <class W>
struct Normalise {
  float near[W::kOwn], scale[W::kOwn], shift[W::kOwn];

  __device__ Normalise(const W& walk, const Norm& norm, NormShared& shared, double* used_mean = nullptr,
                       double* used_var = nullptr) {
    const int i = threadIdx.x;
    if (i < walk.channels() && walk.has(i)) {
      const Coefficients c = coefficients(norm, walk.first + i);
      shared.near[i] = c.near;
      shared.scale[i] = c.scale;
      shared.shift[i] = c.shift;
      if (used_mean && blockIdx.y == 0) {
        used_mean[walk.first + i] = c.mean;
        used_var[walk.first + i] = value_of(norm.var, walk.first + i);
      }
    }
    __syncthreads();
    for (int k = 0; k < W::kOwn; ++k) {
      const int own = walk.lane * W::kOwn + k;
      const bool there = walk.has(own);
      near[k] = there ? shared.near[own] : 0.0f;
      scale[k] = there ? shared.scale[own] : 0.0f;
      shift[k] = there ? shared.shift[own] : 0.0f;
    }
  }
  // The same bits in forward and in backward.
  __device__ float operator()(float x, int i) const {
    return fmaf(x - near[W::own(i)], scale[W::own(i)], shift[W::own(i)]);
  }
};

// Bit i of `bits` says whether the thread's value i passes. Called by all threads of a warp.
template <int kWidth>
__device__ inline void store_mask(uint8_t* mask, const Place& place, unsigned bits) {
  if constexpr (kWidth == kWide) {
    if (place.exists) mask[place.byte] = static_cast<uint8_t>(bits);
  } else {
    const unsigned lane = threadIdx.x % kWarp;
    const unsigned all = __ballot_sync(0xffffffffu, place.exists && bits);
    if (place.exists && lane % 8 == 0) mask[place.byte] = static_cast<uint8_t>(all >> lane);
  }
}

template <int kWidth>
__device__ inline unsigned load_mask(const uint8_t* mask, const Place& place) {
  const unsigned byte = mask[place.byte];
  return kWidth == kWide ? byte : byte >> (threadIdx.x % 8);
}

}  // namespace fastres::cuda
