// bn_act with given statistics: y = act(batch_norm(x) + residual), and a bit for what the ReLU lets through.
#include "tile.cuh"

namespace fastres::cuda {
namespace {

constexpr int kUnroll = 2;
constexpr int kBlocks = 4;  // of a multiprocessor

template <class T, bool kChannelsLast, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident) apply_kernel(View view, Norm norm, Apply args) {
  FASTRES_SHARED(NormShared, shared);
  using W = Walk<kChannelsLast, kWidth>;
  const W walk(view);
  const Normalise<W> normalise(walk, norm, shared, args.used_mean, args.used_var);
  const T *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += kUnroll * static_cast<int64_t>(gridDim.y)) {
    Pack<T, kWidth> packs[kUnroll], others[kUnroll];
    Place places[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.at(tile + u * static_cast<int64_t>(gridDim.y));
      if (!places[u].exists) continue;
      packs[u] = load<kWidth>(x + places[u].offset);
      if (residual) others[u] = load<kWidth>(residual + places[u].offset);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float z[kWidth] = {};
      unsigned bits = 0;
      if (places[u].exists) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          z[i] = normalise(packs[u][i], i);
          if (residual) z[i] += others[u][i];
          bits |= static_cast<unsigned>(!(z[i] <= 0.0f)) << i;
          if (args.relu && z[i] <= 0.0f) z[i] = 0.0f;
        }
        store(static_cast<T*>(args.y) + places[u].offset, z);
      }
      if (args.mask) store_mask<kWidth>(args.mask, places[u], bits);
    }
  }
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
