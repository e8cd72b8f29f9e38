// Mean and variance of every channel, and the running statistics.
//
// Sums of x - k and (x - k)^2 do not cancel where k is near the mean: the mean of a few values from all over the channel.
#include "reduce.cuh"

namespace fastres::cuda {
namespace {

constexpr int kUnroll = 4;  // accesses on their way at once

template <bool kChannelsLast, class T>
__device__ float point(const View& view, const T* x, int64_t channel) {
  constexpr int kSamples = 8;
  float sum = 0.0f;
  int finite = 0;
  for (int s = 0; s < kSamples; ++s) {
    const int64_t at = s * view.count() / kSamples;
    const int64_t image = kChannelsLast ? 0 : quotient(at, view.pixels);
    const float value =
        to_float(kChannelsLast ? x[at * view.channels + channel]
                               : x[(image * view.channels + channel) * view.pixels + at - image * view.pixels]);
    const bool use = isfinite(value);  // if a value is not, the sums will say so
    sum += use ? value / kSamples : 0.0f;
    finite += use;
  }
  return finite == 0 ? 0.0f : sum * (static_cast<float>(kSamples) / finite);
}

struct Points {
  float near[kMostChannels];
};

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    statistics_kernel(View view, const T* x, double* mean, double* var, Workspace work) {
  FASTRES_SHARED(Points, points);
  FASTRES_SHARED(SumsShared, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const int thread = threadIdx.x;
  if (thread < walk.channels() && walk.has(thread))
    points.near[thread] = point<kChannelsLast>(view, x, walk.first + thread);
  __syncthreads();
  float near[W::kOwn], sums[W::kOwn] = {}, squares[W::kOwn] = {};
  for (int k = 0; k < W::kOwn; ++k) {
    const int own = walk.lane * W::kOwn + k;
    near[k] = walk.has(own) ? points.near[own] : 0.0f;
  }
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += kUnroll * static_cast<int64_t>(gridDim.y)) {
    Pack<T, kWidth> packs[kUnroll];
    bool exists[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Place place = walk.at(tile + u * static_cast<int64_t>(gridDim.y));
      exists[u] = place.exists;
      if (place.exists) packs[u] = load<kWidth>(x + place.offset);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!exists[u]) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float distance = packs[u][i] - near[W::own(i)];
        sums[W::own(i)] += distance;
        squares[W::own(i)] = fmaf(distance, distance, squares[W::own(i)]);
      }
    }
  }
  reduce(walk, sums, squares, work, shared, [&](int64_t channel, double sum, double square) {
    const double count = static_cast<double>(view.count()), distance = sum / count;
    const double biased = square / count - distance * distance;
    mean[channel] = points.near[channel - walk.first] + distance;
    var[channel] = biased < 0.0 ? 0.0 : biased;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    update_running_stats_kernel(int64_t channels, Running running, const double* mean, const double* var,
                                const int64_t* num_batches_tracked, double momentum, int64_t count) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= channels) return;
  const double factor = num_batches_tracked ? 1.0 / static_cast<double>(*num_batches_tracked) : momentum;
  const double unbiased = var[channel] * (static_cast<double>(count) / static_cast<double>(count > 1 ? count - 1 : 1));
  T* old_mean = static_cast<T*>(running.mean) + channel * running.mean_stride;
  T* old_var = static_cast<T*>(running.var) + channel * running.var_stride;
  const Vector before[2] = {{old_mean, running.dtype}, {old_var, running.dtype}};
  const double new_mean = value_of(before[0], 0) * (1.0 - factor) + mean[channel] * factor;
  const double new_var = value_of(before[1], 0) * (1.0 - factor) + unbiased * factor;
  if constexpr (std::is_same_v<T, double>) {
    *old_mean = new_mean;
    *old_var = new_var;
  } else {
    const float values[2][1] = {{static_cast<float>(new_mean)}, {static_cast<float>(new_var)}};
    store(old_mean, values[0]);
    store(old_var, values[1]);
  }
}

}  // namespace

cudaError_t statistics(const Shape& shape, const void* x, double* mean, double* var, const Workspace& work,
                       const Queue& queue) {
  return with_view(shape, aligned(x), queue, kReduceBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     return launch(statistics_kernel<T, channels_last.value, width.value>, grid, queue, view,
                                   static_cast<const T*>(x), mean, var, work);
                   });
}

cudaError_t available() {
#ifdef FASTRES_CUDA_ON_CPU
  return cudaSuccess;
#else
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, statistics_kernel<float, true, kWide>);
#endif
}

int64_t Workspace::floats(const Shape& shape, const Queue& queue) {
  // At most one more split than blocks divided by groups of channels; see with_view.
  const int64_t groups = shape.channels_last ? divide_up(shape.channels, kMostChannels) : shape.channels;
  const int64_t splits = divide_up(static_cast<int64_t>(kReduceBlocks) * queue.multiprocessors, groups);
  return splits * 2 * shape.channels;
}

int64_t Workspace::counters(const Shape& shape) {
  return shape.channels_last ? divide_up(shape.channels, kWarp) : shape.channels;
}

cudaError_t update_running_stats(int64_t channels, const Running& running, const double* mean, const double* var,
                                 const int64_t* num_batches_tracked, double momentum, int64_t count,
                                 const Queue& queue) {
  if (channels == 0 || count == 0) return cudaSuccess;
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(update_running_stats_kernel<T>, dim3(static_cast<unsigned>(divide_up(channels, kThreads))), queue,
                  channels, running, mean, var, num_batches_tracked, momentum, count);
  };
  return running.dtype == Dtype::kDouble ? run(Type<double>{}) : with_dtype(running.dtype, run);
}

}  // namespace fastres::cuda
