// The backward of bn_act: a reduction to the gradients of weight and bias, then grad_x.
#include "passes.cuh"

namespace fastres::cuda {
namespace {

constexpr int kUnroll = 2;
constexpr int kBlocks = 4;  // of a multiprocessor, for apply

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_reduce_kernel(View view, Norm norm, Gradient gradient, Reduced reduced, Workspace work) {
  FASTRES_SHARED(NormShared, norm_shared);
  FASTRES_SHARED(SumsShared<2>, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, norm, norm_shared);
  float sums[2][W::kOwn] = {};
  sum_gradients<T, kWidth>(walk, normalise, gradient, static_cast<T*>(reduced.masked), sums, Nothing{});
  reduce(walk, sums, work, shared, [&](int64_t channel, const double (&totals)[2]) {
    finish_gradient(norm, reduced, gradient.training, view.channels, view.count(), channel, totals[0], totals[1]);
  });
}

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_apply_kernel(View view, Norm norm, Gradient gradient, const float* factors, T* grad_x) {
  FASTRES_SHARED(NormShared, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, norm, shared);
  const Factors<W> factor(walk, factors, normalise);
  const T *grad = static_cast<const T*>(gradient.grad_y), *x = static_cast<const T*>(gradient.x);
  const bool needs_x = gradient.training || gradient.relu == Relu::kRecomputed;
  for (int64_t turn = blockIdx.y; turn < view.tiles; turn += kUnroll * static_cast<int64_t>(gridDim.y)) {
    Pack<T, kWidth> grads[kUnroll], values[kUnroll];
    Place places[kUnroll];
    unsigned bits[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t tile = view.tiles - 1 - (turn + u * static_cast<int64_t>(gridDim.y));
      places[u] = walk.at(tile < 0 ? 0 : tile);
      places[u].exists = places[u].exists && tile >= 0;
      if (!places[u].exists) continue;
      grads[u] = load<kWidth>(grad + places[u].offset);
      values[u] = needs_x ? load<kWidth>(x + places[u].offset) : grads[u];
      if (gradient.relu == Relu::kMasked) bits[u] = load_mask<kWidth>(gradient.mask, places[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!places[u].exists) continue;
      float out[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float g = behind_relu(gradient.relu, normalise, grads[u][i], values[u][i], bits[u], i);
        out[i] = factor(g, values[u][i] - normalise.near[W::own(i)], gradient.training, i);
      }
      store(grad_x + places[u].offset, out);
    }
  }
}

}  // namespace

cudaError_t backward_reduce(const Shape& shape, const Norm& norm, const Gradient& gradient, const Reduced& reduced,
                            const Workspace& work, const Queue& queue) {
  return with_view(shape, aligned(gradient.grad_y, gradient.x, reduced.masked), queue, kReduceBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     return launch(backward_reduce_kernel<T, channels_last.value, width.value>, grid, queue, view, norm,
                                   gradient, reduced, work);
                   });
}

cudaError_t backward_apply(const Shape& shape, const Norm& norm, const Gradient& gradient, const float* factors,
                           void* grad_x, const Queue& queue) {
  return with_view(shape, aligned(gradient.grad_y, gradient.x, grad_x), queue, kBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     return launch(backward_apply_kernel<T, channels_last.value, width.value>, grid, queue, view, norm,
                                   gradient, factors, static_cast<T*>(grad_x));
                   });
}

}  // namespace fastres::cuda
