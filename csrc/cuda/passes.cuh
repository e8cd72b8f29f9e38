// The passes over an activation that batch norm is made of, for kernels that make one of them and for those that make two.
//
// keep(turn, packs...) of a reducing pass gets what it has read; turn counts the tiles of the block, from 0. values(turn, place)
// of an applying pass gives it what it needs: from memory, or what was kept.
#pragma once

#include "reduce.cuh"

namespace fastres::cuda {

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

// What the sums of a block are taken around: sums of x - k and (x - k)^2 do not cancel where k is near the mean, and k is the
// mean of a few values from all over the channel.
struct Points {
  float near[kMostChannels];
};

struct Nothing {
  template <class... Anything>
  __device__ void operator()(const Anything&...) const {}
};

// sums: of the distance from the point and of its square.
template <class T, int kWidth, class W, class Keep>
__device__ inline void sum_distances(const W& walk, const T* x, const Points& points, float (&sums)[2][W::kOwn],
                                     const Keep& keep) {
  constexpr int kUnroll = 4;  // accesses on their way at once
  const View& view = walk.view;
  float near[W::kOwn];
  for (int k = 0; k < W::kOwn; ++k) {
    const int own = walk.lane * W::kOwn + k;
    near[k] = walk.has(own) ? points.near[own] : 0.0f;
  }
  int turn = 0;
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
      keep(turn + u, packs[u]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float distance = packs[u][i] - near[W::own(i)];
        sums[0][W::own(i)] += distance;
        sums[1][W::own(i)] = fmaf(distance, distance, sums[1][W::own(i)]);
      }
    }
    turn += kUnroll;
  }
}

// What reduce does at its end with those sums.
struct Moments {
  const Points& points;
  int64_t first, count;  // channel of the block, values of a channel
  double *mean, *var;
  __device__ void operator()(int64_t channel, const double (&totals)[2]) const {
    const double values = static_cast<double>(count), distance = totals[0] / values;
    const double biased = totals[1] / values - distance * distance;
    mean[channel] = points.near[channel - first] + distance;
    var[channel] = biased < 0.0 ? 0.0 : biased;
  }
};

// y = act(batch_norm(x) + residual), and the mask.
template <class T, int kWidth, class W, class Values>
__device__ inline void apply_all(const W& walk, const Normalise<W>& normalise, const Apply& args,
                                 const Values& values) {
  constexpr int kUnroll = 2;
  const View& view = walk.view;
  const T* residual = static_cast<const T*>(args.residual);
  int turn = 0;
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += kUnroll * static_cast<int64_t>(gridDim.y)) {
    Pack<T, kWidth> packs[kUnroll], others[kUnroll];
    Place places[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.at(tile + u * static_cast<int64_t>(gridDim.y));
      if (!places[u].exists) continue;
      packs[u] = values(turn + u, places[u]);
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
    turn += kUnroll;
  }
}

// What the ReLU lets through of the gradient g of value i.
template <class W>
__device__ inline float behind_relu(Relu relu, const Normalise<W>& normalise, float g, float x, unsigned bits, int i) {
  if (relu == Relu::kRecomputed) return normalise(x, i) <= 0.0f ? 0.0f : g;
  if (relu == Relu::kMasked) return bits >> i & 1 ? g : 0.0f;
  return g;
}

// sums: of g and of g * (x - near), for the gradient g behind the ReLU, which is stored in `masked` if that is not null.
template <class T, int kWidth, class W, class Keep>
__device__ inline void sum_gradients(const W& walk, const Normalise<W>& normalise, const Gradient& gradient, T* masked,
                                     float (&sums)[2][W::kOwn], const Keep& keep) {
  constexpr int kUnroll = 2;
  const View& view = walk.view;
  const T *grad = static_cast<const T*>(gradient.grad_y), *x = static_cast<const T*>(gradient.x);
  int turn = 0;
  for (int64_t tile = blockIdx.y; tile < view.tiles; tile += kUnroll * static_cast<int64_t>(gridDim.y)) {
    Pack<T, kWidth> grads[kUnroll], values[kUnroll];
    Place places[kUnroll];
    unsigned bits[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.at(tile + u * static_cast<int64_t>(gridDim.y));
      if (!places[u].exists) continue;
      grads[u] = load<kWidth>(grad + places[u].offset);
      values[u] = load<kWidth>(x + places[u].offset);
      if (gradient.relu == Relu::kMasked) bits[u] = load_mask<kWidth>(gradient.mask, places[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!places[u].exists) continue;
      float g[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const int k = W::own(i);
        g[i] = behind_relu(gradient.relu, normalise, grads[u][i], values[u][i], bits[u], i);
        sums[0][k] += g[i];
        sums[1][k] = fmaf(g[i], values[u][i] - normalise.near[k], sums[1][k]);
      }
      if (masked) store(masked + places[u].offset, g);
      keep(turn + u, g, values[u]);
    }
    turn += kUnroll;
  }
}

}  // namespace fastres::cuda
