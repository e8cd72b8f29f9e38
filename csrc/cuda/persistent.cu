// bn_act with batch statistics, forward and backward, in one launch each: a block keeps its part of the activation in shared
// memory between the reduction and the pass that needs its result, and waits for the others in between.
//
// Beside two launches, forward reads x once in place of twice, backward x and grad_y once in place of twice, and the mask. The
// sums are cut otherwise than in statistics and backward_reduce, so their last bits differ; each repeats its own.
#include "passes.cuh"

namespace fastres::cuda {
namespace {

// Shared memory in which every thread keeps packs of its own: nothing has to be waited for. Threads of a warp have neighbouring
// words of 16 bytes.
template <class T, int kWidth>
class Kept {
  static_assert(kWidth == kWide, "kept 16 bytes at a time");
  static constexpr int kWords = sizeof(Pack<T, kWidth>) / sizeof(uint4);
  uint4* memory_;

 public:
  __device__ explicit Kept(uint4* memory) : memory_(memory) {}
  __device__ void put(int slot, const Pack<T, kWidth>& pack) const {
    uint4 raw[kWords];
    memcpy(raw, &pack, sizeof pack);
    for (int i = 0; i < kWords; ++i) memory_[(slot * kWords + i) * kThreads + threadIdx.x] = raw[i];
  }
  __device__ Pack<T, kWidth> get(int slot) const {
    uint4 raw[kWords];
    for (int i = 0; i < kWords; ++i) raw[i] = memory_[(slot * kWords + i) * kThreads + threadIdx.x];
    Pack<T, kWidth> pack;
    memcpy(static_cast<void*>(&pack), raw, sizeof pack);
    return pack;
  }
};

// norm has neither mean nor var: they are computed here.
template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    persistent_kernel(View view, Norm norm, Apply args, double* mean, double* var, Workspace work) {
  FASTRES_SHARED_BYTES(memory);
  FASTRES_SHARED(Points, points);
  FASTRES_SHARED(NormShared, norm_shared);
  FASTRES_SHARED(SumsShared<2>, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Kept<T, kWidth> kept(memory);
  const T* x = static_cast<const T*>(args.x);
  const int thread = threadIdx.x;
  if (thread < walk.channels() && walk.has(thread))
    points.near[thread] = point<kChannelsLast>(view, x, walk.first + thread);
  __syncthreads();
  float sums[2][W::kOwn] = {};
  sum_distances<T, kWidth>(walk, x, points, sums,
                           [&](int turn, const Pack<T, kWidth>& values) { kept.put(turn, values); });
  reduce_and_wait(walk, sums, work, shared, Moments{points, walk.first, view.count(), mean, var});
  norm.mean = {mean, Dtype::kDouble};
  norm.var = {var, Dtype::kDouble};
  const Normalise<W> normalise(walk, norm, norm_shared);
  apply_all<T, kWidth>(walk, normalise, args, [&](int turn, const Place&) { return kept.get(turn); });
}

// Every turn keeps two packs: the gradient behind the ReLU, and x.
template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    persistent_backward_kernel(View view, Norm norm, Gradient gradient, Reduced reduced, T* grad_x, Workspace work) {
  FASTRES_SHARED_BYTES(memory);
  FASTRES_SHARED(NormShared, norm_shared);
  FASTRES_SHARED(SumsShared<2>, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Kept<T, kWidth> kept(memory);
  const Normalise<W> normalise(walk, norm, norm_shared);
  float sums[2][W::kOwn] = {};
  sum_gradients<T, kWidth>(walk, normalise, gradient, static_cast<T*>(reduced.masked), sums,
                           [&](int turn, const float (&g)[kWidth], const Pack<T, kWidth>& values) {
                             kept.put(2 * turn, rounded<T>(g));  // which is exact: g is a value of grad_y, or 0
                             kept.put(2 * turn + 1, values);
                           });
  reduce_and_wait(walk, sums, work, shared, [&](int64_t channel, const double (&totals)[2]) {
    finish_gradient(norm, reduced, true, view.channels, view.count(), channel, totals[0], totals[1]);
  });
  const Factors<W> factor(walk, reduced.factors, normalise);
  int turn = 0;
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += gridDim.y, ++turn) {
    const Place place = walk.at(tile);
    if (!place.exists) continue;
    const Pack<T, kWidth> g = kept.get(2 * turn), values = kept.get(2 * turn + 1);
    float out[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = factor(g[i], values[i] - normalise.near[W::own(i)], true, i);
    store(grad_x + place.offset, out);
  }
}

template <class T>
constexpr auto forward_kernel = persistent_kernel<T, true, kWide>;
template <class T>
constexpr auto backward_kernel = persistent_backward_kernel<T, true, kWide>;

struct Plan {
  View view;
  dim3 grid;
  int resident;    // blocks of a multiprocessor at once
  int64_t shared;  // bytes that a block keeps
};

// How an activation is spread over the chip, `tensors` of its shape in shared memory. False if they do not fit.
bool plan(const Shape& shape, int tensors, const Queue& queue, Plan* out) {
  constexpr int64_t kOwn = 1024;  // bytes that the system takes for each block
  constexpr int64_t kSums = sizeof(Points) + sizeof(NormShared) + sizeof(SumsShared<2>) + 64;
  Cut found;
  if (!shape.channels_last || cut(shape, true, &found) != cudaSuccess || found.width != kWide) return false;
  const int64_t tile = static_cast<int64_t>(tensors) * kThreads * kWide * (shape.dtype == Dtype::kFloat ? 4 : 2);
  for (int resident = kResident; resident > 0; --resident) {
    const int64_t each = queue.shared / resident - kOwn;
    const int64_t room = (each < queue.shared_block ? each : queue.shared_block) - kSums;
    int64_t splits = static_cast<int64_t>(resident) * queue.multiprocessors / found.groups;
    if (splits > found.view.tiles) splits = found.view.tiles;
    if (splits < 1) return false;
    const int64_t shared = divide_up(found.view.tiles, splits) * tile;
    if (shared > room) continue;
    *out = {found.view, dim3(static_cast<unsigned>(found.groups), static_cast<unsigned>(splits)), resident, shared};
    return true;
  }
  return false;
}

// Whether so many blocks really are on a multiprocessor at once: the compiler decides about registers, the driver about the rest.
template <class Kernel>
bool resident([[maybe_unused]] Kernel kernel, [[maybe_unused]] const Plan& plan) {
#ifdef FASTRES_CUDA_ON_CPU
  return true;
#else
  int blocks = 0;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared)) ==
             cudaSuccess &&
         cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, static_cast<size_t>(plan.shared)) ==
             cudaSuccess &&
         blocks >= plan.resident;
#endif
}

}  // namespace

bool fits_on_chip(const Shape& shape, bool backward, const Queue& queue) {
  Plan found;
  if (!plan(shape, backward ? 2 : 1, queue, &found)) return false;
  bool fits = false;
  const cudaError_t error = with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    fits = backward ? resident(backward_kernel<T>, found) : resident(forward_kernel<T>, found);
    return cudaSuccess;
  });
  return error == cudaSuccess && fits;
}

cudaError_t persistent(const Shape& shape, const Norm& norm, const Apply& args, double* mean, double* var,
                       const Workspace& work, const Queue& queue) {
  Plan found;
  if (!aligned(args.x, args.residual, args.y) || !plan(shape, 1, queue, &found)) return cudaErrorInvalidValue;
  return with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_together(forward_kernel<T>, found.grid, found.shared, queue, found.view, norm, args, mean, var, work);
  });
}

cudaError_t persistent_backward(const Shape& shape, const Norm& norm, const Gradient& gradient, const Reduced& reduced,
                                void* grad_x, const Workspace& work, const Queue& queue) {
  Plan found;
  if (!aligned(gradient.grad_y, gradient.x, reduced.masked, grad_x) || !plan(shape, 2, queue, &found))
    return cudaErrorInvalidValue;
  return with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_together(backward_kernel<T>, found.grid, found.shared, queue, found.view, norm, gradient, reduced,
                           static_cast<T*>(grad_x), work);
  });
}

}  // namespace fastres::cuda
