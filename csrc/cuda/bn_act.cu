// bn_act with given statistics: y = act(batch_norm(x) + residual), and a bit for what the ReLU lets through.
#include "passes.cuh"

namespace fastres::cuda {
namespace {

constexpr int kBlocks = 4;  // of a multiprocessor

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident) apply_kernel(View view, Norm norm, Apply args) {
  FASTRES_SHARED(NormShared, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, norm, shared, args.used_mean, args.used_var);
  apply_all<T, kWidth>(walk, normalise, args, [&](int, const Place& place) {
    return load<kWidth>(static_cast<const T*>(args.x) + place.offset);
  });
}

}  // namespace

cudaError_t apply(const Shape& shape, const Norm& norm, const Apply& args, const Queue& queue) {
  return with_view(shape, aligned(args.x, args.residual, args.y), queue, kBlocks,
                   [&](auto type, auto channels_last, auto width, const View& view, dim3 grid) {
                     using T = typename decltype(type)::type;
                     return launch(apply_kernel<T, channels_last.value, width.value>, grid, queue, view, norm, args);
                   });
}

}  // namespace fastres::cuda
