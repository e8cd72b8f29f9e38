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
  FASTRES_SHARED(SumsShared<2>, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const int thread = threadIdx.x;
  if (thread < walk.channels() && walk.has(thread))
    points.near[thread] = point<kChannelsLast>(view, x, walk.first + thread);
  __syncthreads();
  float near[W::kOwn], sums[2][W::kOwn] = {};  // of the distance and of its square
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
        sums[0][W::own(i)] += distance;
        sums[1][W::own(i)] = fmaf(distance, distance, sums[1][W::own(i)]);
      }
    }
  }
  reduce(walk, sums, work, shared, [&](int64_t channel, const double (&totals)[2]) {
    const double count = static_cast<double>(view.count()), distance = totals[0] / count;
    const double biased = totals[1] / count - distance * distance;
    mean[channel] = points.near[channel - walk.first] + distance;
    var[channel] = biased < 0.0 ? 0.0 : biased;
  });
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
