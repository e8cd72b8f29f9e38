// bn_add_bn_act and its backward: both branches of a block with a projection normalised and joined in one pass.
//
// Beside a batch norm of the shortcut and one that adds it, forward saves a write and a read of the normalised shortcut.
// Backward reads both branches, the gradient and the mask twice each, and writes nothing but the two results.
#include "reduce.cuh"

namespace fastres::cuda {
namespace {

constexpr int kUnroll = 2;
constexpr int kBlocks = 4;  // of a multiprocessor

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    join_kernel(View view, Branch branch, Branch other, T* y, uint8_t* mask, bool relu) {
  FASTRES_SHARED(NormShared, shared);
  FASTRES_SHARED(NormShared, other_shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, branch.norm, shared, branch.used_mean, branch.used_var);
  const Normalise<W> normalise_other(walk, other.norm, other_shared, other.used_mean, other.used_var);
  const T *x = static_cast<const T*>(branch.x), *other_x = static_cast<const T*>(other.x);
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += kUnroll * static_cast<int64_t>(gridDim.y)) {
    Pack<T, kWidth> packs[kUnroll], others[kUnroll];
    Place places[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.at(tile + u * static_cast<int64_t>(gridDim.y));
      if (!places[u].exists) continue;
      packs[u] = load<kWidth>(x + places[u].offset);
      others[u] = load<kWidth>(other_x + places[u].offset);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float z[kWidth] = {};
      unsigned bits = 0;
      if (places[u].exists) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          z[i] = normalise(packs[u][i], i) + normalise_other(others[u][i], i);
          bits |= static_cast<unsigned>(!(z[i] <= 0.0f)) << i;
          if (relu && z[i] <= 0.0f) z[i] = 0.0f;
        }
        store(y + places[u].offset, z);
      }
      if (mask) store_mask<kWidth>(mask, places[u], bits);
    }
  }
}

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    join_backward_reduce_kernel(View view, const T* grad, const uint8_t* mask, BranchGradient branch,
                                BranchGradient other, Workspace work) {
  FASTRES_SHARED(NormShared, norm_shared);
  FASTRES_SHARED(NormShared, other_shared);
  FASTRES_SHARED(SumsShared<3>, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, branch.norm, norm_shared), normalise_other(walk, other.norm, other_shared);
  const T *x = static_cast<const T*>(branch.x), *other_x = static_cast<const T*>(other.x);
  float sums[3][W::kOwn] = {};  // of g, and of g * (x - near) of either branch
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += kUnroll * static_cast<int64_t>(gridDim.y)) {
    Pack<T, kWidth> grads[kUnroll], values[kUnroll], others[kUnroll];
    Place places[kUnroll];
    unsigned bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.at(tile + u * static_cast<int64_t>(gridDim.y));
      if (!places[u].exists) continue;
      grads[u] = load<kWidth>(grad + places[u].offset);
      values[u] = branch.reduced.factors ? load<kWidth>(x + places[u].offset) : grads[u];
      others[u] = other.reduced.factors ? load<kWidth>(other_x + places[u].offset) : grads[u];
      bits[u] = mask ? load_mask<kWidth>(mask, places[u]) : ~0u;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!places[u].exists) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const int k = W::own(i);
        const float g = bits[u] >> i & 1 ? grads[u][i] : 0.0f;
        sums[0][k] += g;
        sums[1][k] = fmaf(g, values[u][i] - normalise.near[k], sums[1][k]);
        sums[2][k] = fmaf(g, others[u][i] - normalise_other.near[k], sums[2][k]);
      }
    }
  }
  reduce(walk, sums, work, shared, [&](int64_t channel, const double (&totals)[3]) {
    const int64_t channels = view.channels, count = view.count();
    if (branch.reduced.factors) {
      finish_gradient(branch.norm, branch.reduced, branch.training, channels, count, channel, totals[0], totals[1]);
    }
    if (other.reduced.factors) {
      finish_gradient(other.norm, other.reduced, other.training, channels, count, channel, totals[0], totals[2]);
    }
  });
}

// The gradient of one branch's values for the gradients g behind the ReLU.
template <class T, class W, int kWidth>
__device__ void branch_gradient(const BranchGradient& branch, const Normalise<W>& normalise, const Factors<W>& factor,
                                const float (&g)[kWidth], const Pack<T, kWidth>& values, int64_t offset) {
  float out[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    out[i] = factor(g[i], values[i] - normalise.near[W::own(i)], branch.training, i);
  }
  store(static_cast<T*>(branch.grad_x) + offset, out);
}

// One tile at a time: the factors of two branches take most of the registers.
template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    join_backward_apply_kernel(View view, const T* grad, const uint8_t* mask, BranchGradient branch,
                               BranchGradient other) {
  FASTRES_SHARED(NormShared, shared);
  FASTRES_SHARED(NormShared, other_shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, branch.norm, shared), normalise_other(walk, other.norm, other_shared);
  const Factors<W> factor(walk, branch.reduced.factors, normalise);
  const Factors<W> factor_other(walk, other.reduced.factors, normalise_other);
  const T *x = static_cast<const T*>(branch.x), *other_x = static_cast<const T*>(other.x);
  for (int64_t turn = blockIdx.y; turn < view.tiles; turn += gridDim.y) {
    const Place place = walk.at(view.tiles - 1 - turn);
    if (!place.exists) continue;
    const Pack<T, kWidth> grads = load<kWidth>(grad + place.offset);
    const Pack<T, kWidth> values = branch.grad_x && branch.training ? load<kWidth>(x + place.offset) : grads;
    const Pack<T, kWidth> others = other.grad_x && other.training ? load<kWidth>(other_x + place.offset) : grads;
    const unsigned bits = mask ? load_mask<kWidth>(mask, place) : ~0u;
    float g[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) g[i] = bits >> i & 1 ? grads[i] : 0.0f;
    if (branch.grad_x) branch_gradient(branch, normalise, factor, g, values, place.offset);
    if (other.grad_x) branch_gradient(other, normalise_other, factor_other, g, others, place.offset);
  }
}

}  // namespace

cudaError_t join(const Shape& shape, const Branch& branch, const Branch& other, void* y, uint8_t* mask, bool relu,
                 const Queue& queue) {
  return with_view(shape, aligned(branch.x, other.x, y), queue, kBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     return launch(join_kernel<T, channels_last.value, width.value>, grid, queue, view, branch, other,
                                   static_cast<T*>(y), mask, relu);
                   });
}

cudaError_t join_backward_reduce(const Shape& shape, const void* grad_y, const uint8_t* mask,
                                 const BranchGradient& branch, const BranchGradient& other, const Workspace& work,
                                 const Queue& queue) {
  return with_view(shape, aligned(grad_y, branch.x, other.x), queue, kReduceBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     return launch(join_backward_reduce_kernel<T, channels_last.value, width.value>, grid, queue, view,
                                   static_cast<const T*>(grad_y), mask, branch, other, work);
                   });
}

cudaError_t join_backward_apply(const Shape& shape, const void* grad_y, const uint8_t* mask,
                                const BranchGradient& branch, const BranchGradient& other, const Queue& queue) {
  return with_view(shape, aligned(grad_y, branch.x, other.x, branch.grad_x, other.grad_x), queue, kBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     return launch(join_backward_apply_kernel<T, channels_last.value, width.value>, grid, queue, view,
                                   static_cast<const T*>(grad_y), mask, branch, other);
                   });
}

}  // namespace fastres::cuda
