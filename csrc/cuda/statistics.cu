// Mean and variance of every channel, and the running statistics.
#include "passes.cuh"

namespace fastres::cuda {
namespace {

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    statistics_kernel(View view, const T* x, double* mean, double* var, Workspace work) {
  FASTRES_SHARED(Points, points);
  FASTRES_SHARED(SumsShared<2>, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const int thread = threadIdx.x;
  if (thread < walk.channels() && walk.has(thread))
    points.near[thread] = point<kChannelsLast>(view, x, walk.first + thread);
  __syncthreads();
  float sums[2][W::kOwn] = {};
  sum_distances<T, kWidth>(walk, x, points, sums, Nothing{});
  reduce(walk, sums, work, shared, Moments{points, walk.first, view.count(), mean, var});
}

constexpr int kLayers = 40;  // of a launch: kernels take 4 KB of arguments
struct Updates {
  Update layers[kLayers];
};
static_assert(sizeof(Updates) <= 4096);

__device__ void set(void* data, Dtype dtype, int64_t i, double value) {
  const float rounded[1] = {static_cast<float>(value)};
  switch (dtype) {
    case Dtype::kDouble: static_cast<double*>(data)[i] = value; break;
    case Dtype::kBFloat16: store(static_cast<__nv_bfloat16*>(data) + i, rounded); break;
    case Dtype::kHalf: store(static_cast<__half*>(data) + i, rounded); break;
    default: static_cast<float*>(data)[i] = rounded[0];
  }
}

// blockIdx.y is the layer.
__global__ void __launch_bounds__(kThreads, kResident)
    update_running_stats_kernel(__grid_constant__ const Updates all) {
  const Update& layer = all.layers[blockIdx.y];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= layer.channels) return;
  const double factor =
      layer.num_batches_tracked ? 1.0 / static_cast<double>(*layer.num_batches_tracked) : layer.momentum;
  const double count = static_cast<double>(layer.count);
  const double unbiased = layer.var[channel] * (layer.count > 1 ? count / (count - 1.0) : 1.0);
  const Running& running = layer.running;
  const int64_t mean_at = channel * running.mean_stride, var_at = channel * running.var_stride;
  const double old_mean = value_of({running.mean, running.dtype}, mean_at);
  const double old_var = value_of({running.var, running.dtype}, var_at);
  set(running.mean, running.dtype, mean_at, old_mean * (1.0 - factor) + layer.mean[channel] * factor);
  set(running.var, running.dtype, var_at, old_var * (1.0 - factor) + unbiased * factor);
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

int64_t Workspace::floats(const Shape& shape, const Queue& queue, int sums) {
  // At most one more split than blocks divided by groups of channels; see with_view.
  const int64_t groups = shape.channels_last ? divide_up(shape.channels, kMostChannels) : shape.channels;
  const int64_t splits = divide_up(static_cast<int64_t>(kReduceBlocks) * queue.multiprocessors, groups);
  return splits * sums * shape.channels;
}

int64_t Workspace::counters(const Shape& shape) {
  return shape.channels_last ? divide_up(shape.channels, kWarp) : shape.channels;
}

cudaError_t update_running_stats(const Update* updates, int64_t layers, const Queue& queue) {
  for (int64_t first = 0; first < layers; first += kLayers) {
    Updates some{};
    int64_t here = 0, channels = 0;
    for (int64_t i = first; i < layers && i < first + kLayers; ++i) {
      if (updates[i].channels == 0 || updates[i].count == 0) continue;
      some.layers[here++] = updates[i];
      if (updates[i].channels > channels) channels = updates[i].channels;
    }
    if (here == 0) continue;
    const dim3 grid(static_cast<unsigned>(divide_up(channels, kThreads)), static_cast<unsigned>(here));
    const cudaError_t error = launch(update_running_stats_kernel, grid, queue, some);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastres::cuda
