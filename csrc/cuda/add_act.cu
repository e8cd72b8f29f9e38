// add_act and its backward. The layout does not matter: both tensors have the same.
#include "device.cuh"

namespace fastres::cuda {
namespace {

constexpr int kUnroll = 2;
constexpr int kBlocks = 8;  // of a multiprocessor

struct Sum {
  bool relu;
  __device__ float operator()(float x, float residual) const {
    const float z = x + residual;
    return relu && z <= 0.0f ? 0.0f : z;
  }
};
struct Kept {
  __device__ float operator()(float grad, float y) const { return y <= 0.0f ? 0.0f : grad; }
};

// out = f(a, b): kWidth values at a time, and those that are left over one by one.
template <class T, int kWidth, class F>
__global__ void __launch_bounds__(kThreads, 2 * kResident)
    elementwise_kernel(int64_t size, const T* a, const T* b, T* out, F f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, packs = size / kWidth;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t first = thread; first < packs; first += kUnroll * step) {
    Pack<T, kWidth> left[kUnroll], right[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = (first + u * step) * kWidth;
      if (first + u * step >= packs) continue;
      left[u] = load<kWidth>(a + at);
      right[u] = load<kWidth>(b + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * step >= packs) continue;
      float values[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] = f(left[u][i], right[u][i]);
      store(out + (first + u * step) * kWidth, values);
    }
  }
  const int64_t rest = packs * kWidth + thread;
  if (rest < size) {
    const float value[1] = {f(to_float(a[rest]), to_float(b[rest]))};
    store(out + rest, value);
  }
}

template <class F>
cudaError_t elementwise(Dtype dtype, int64_t size, const void* a, const void* b, void* out, F f, const Queue& queue) {
  if (size <= 0) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool wide = aligned(a, b, out);
    const int64_t most = static_cast<int64_t>(kBlocks) * queue.multiprocessors;
    const int64_t needed = divide_up(divide_up(size, wide ? kWide : 1), kThreads);
    const dim3 grid(static_cast<unsigned>(needed < most ? needed : most));
    const auto kernel = wide ? elementwise_kernel<T, kWide, F> : elementwise_kernel<T, 1, F>;
    return launch(kernel, grid, queue, size, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out),
                  f);
  });
}

}  // namespace

cudaError_t add_act(Dtype dtype, int64_t size, const void* x, const void* residual, void* y, bool relu,
                    const Queue& queue) {
  return elementwise(dtype, size, x, residual, y, Sum{relu}, queue);
}

cudaError_t add_act_backward(Dtype dtype, int64_t size, const void* grad_y, const void* y, void* grad_x,
                             const Queue& queue) {
  return elementwise(dtype, size, grad_y, y, grad_x, Kept{}, queue);
}

}  // namespace fastres::cuda
