// Sums over all values of a channel, in one launch and in a fixed order.
//
// A block adds what its threads have, in shared memory; the last block of a group of channels, which a counter tells, adds
// what all blocks left, in double.
#pragma once

#include "tile.cuh"

namespace fastres::cuda {

constexpr int kReduceBlocks = 4;  // of a multiprocessor

template <int kSums>
struct SumsShared {
  float values[kThreads * kSums * kWide];  // [row][sum][channel]
  float parts[kSums * kMostChannels];      // [part][sum][channel], also below
  double totals[kSums * kMostChannels];
  bool last;
};

// Threads that share the work on one of so many sums.
__device__ inline int parts_of(int sums) {
  const int parts = kThreads / sums;
  return parts < 1 ? 1 : parts > kWarp ? kWarp : parts;
}

// Adds up what the threads of the block have, and leaves it where the last block finds it.
template <class W, int kSums>
__device__ inline void leave_sums(const W& walk, const float (&mine)[kSums][W::kOwn], const Workspace& work,
                                  SumsShared<kSums>& shared) {
  const int thread = threadIdx.x, channels = walk.channels(), sums = kSums * channels,
            rows = kThreads / walk.view.lanes;
  for (int s = 0; s < kSums; ++s) {
    for (int i = 0; i < W::kOwn; ++i) {
      shared.values[walk.row * sums + s * channels + walk.lane * W::kOwn + i] = mine[s][i];
    }
  }
  __syncthreads();
  const int parts = parts_of(sums);
  for (int i = thread; i < sums * parts; i += kThreads) {
    float sum = 0.0f;
    for (int row = i / sums; row < rows; row += parts) sum += shared.values[row * sums + i % sums];
    shared.parts[i] = sum;
  }
  __syncthreads();
  for (int i = thread; i < sums; i += kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part) sum += shared.parts[part * sums + i];
    const int c = i % channels;
    if (walk.has(c)) {
      work.partial[(static_cast<int64_t>(blockIdx.y) * kSums + i / channels) * walk.view.channels + walk.first + c] =
          sum;
    }
  }
  __syncthreads();
}

// Tells the counter of the group of channels that the block has left its sums. Returns whether all others have.
template <int kSums>
__device__ inline bool arrive(unsigned* counter, unsigned last_count, SumsShared<kSums>& shared) {
  if (threadIdx.x == 0) {
    __threadfence();  // of what the whole block wrote
    shared.last = atomicInc(counter, last_count) == gridDim.y - 1;
    __threadfence();
  }
  __syncthreads();
  return shared.last;
}

// The last block: adds up what all have left, in the order of the blocks.
template <class W, int kSums, class Finish>
__device__ inline void add_up(const W& walk, const Workspace& work, SumsShared<kSums>& shared, const Finish& finish) {
  const int thread = threadIdx.x, channels = walk.channels(), sums = kSums * channels, parts = parts_of(sums);
  for (int i = thread; i < sums * parts; i += kThreads) {
    double sum = 0.0;
    const int c = i % sums % channels, which = i % sums / channels;
    if (walk.has(c)) {
      const float* partial = work.partial + which * walk.view.channels + walk.first + c;
      for (int split = i / sums; split < static_cast<int>(gridDim.y); split += parts) {
        sum += partial[static_cast<int64_t>(split) * kSums * walk.view.channels];
      }
    }
    shared.totals[i] = sum;
  }
  __syncthreads();
  for (int c = thread; c < channels; c += kThreads) {
    double totals[kSums] = {};
    for (int part = 0; part < parts; ++part) {
      for (int s = 0; s < kSums; ++s) totals[s] += shared.totals[part * sums + s * channels + c];
    }
    if (walk.has(c)) finish(walk.first + c, totals);
  }
}

// finish(channel, totals), by one thread for each channel: the sums of what all threads have in `mine`.
template <class W, int kSums, class Finish>
__device__ inline void reduce(const W& walk, const float (&mine)[kSums][W::kOwn], const Workspace& work,
                              SumsShared<kSums>& shared, const Finish& finish) {
  leave_sums(walk, mine, work, shared);
  if (!arrive(work.tickets + blockIdx.x, gridDim.y - 1, shared)) return;  // which leaves 0
  add_up(walk, work, shared, finish);
}

// The same, after which every block of the launch, which must run all at once (launch_together), sees what finish wrote.
//
// The counter of a group of n blocks goes from 0 to n as they arrive, to n + 1 when the last one has finished, and to 2 n,
// which is 0 again, as the others go on. Only blocks of the same channels wait for each other.
template <class W, int kSums, class Finish>
__device__ inline void reduce_and_wait(const W& walk, const float (&mine)[kSums][W::kOwn], const Workspace& work,
                                       SumsShared<kSums>& shared, const Finish& finish) {
  constexpr unsigned kNap = 40;  // ns: about the time in which a value that another block wrote gets here
  unsigned* counter = work.tickets + blockIdx.x;
  const unsigned blocks = gridDim.y, last_count = 2 * blocks - 1;
  leave_sums(walk, mine, work, shared);
  const bool last = arrive(counter, last_count, shared);
  if (last) {
    add_up(walk, work, shared, finish);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (last) {
      __threadfence();  // of what finish wrote
    } else {
      while (peek(counter) <= blocks) __nanosleep(kNap);
      __threadfence();
    }
    atomicInc(counter, last_count);
  }
  __syncthreads();
}

// What the last block makes of sum g and sum g * (x - near).
__device__ inline void finish_gradient(const Norm& norm, const Reduced& out, bool training, int64_t channels,
                                       int64_t count, int64_t channel, double total, double product) {
  const Coefficients c = coefficients(norm, channel);
  const double rest = isfinite(c.mean) ? c.near - c.mean : 0.0;
  product += rest * total;  // of g and x - mean
  if (out.grad_weight) {
    out.grad_weight[channel] = static_cast<float>(product * c.inverse);
    out.grad_bias[channel] = static_cast<float>(total);
  }
  if (out.factors) {
    const double slope = training ? c.inverse * c.inverse * product / count : 0.0;
    const double constant = training ? total / count + slope * rest : 0.0;
    out.factors[channel] = c.scale;
    out.factors[channels + channel] = static_cast<float>(constant);
    out.factors[2 * channels + channel] = static_cast<float>(slope);
  }
}

// The factors of a thread's channels, from memory; those of running statistics where there are none.
template <class W>
struct Factors {
  float scale[W::kOwn], constant[W::kOwn], slope[W::kOwn];
  __device__ Factors(const W& walk, const float* factors, const Normalise<W>& normalise) {
    const int64_t channels = walk.view.channels;
    for (int k = 0; k < W::kOwn; ++k) {
      const bool there = factors && walk.channel + k < channels;
      scale[k] = there ? factors[walk.channel + k] : normalise.scale[k];
      constant[k] = there ? factors[channels + walk.channel + k] : 0.0f;
      slope[k] = there ? factors[2 * channels + walk.channel + k] : 0.0f;
    }
  }
  // Of x for the gradient g behind the ReLU; centred = x - near.
  __device__ float operator()(float g, float centred, bool training, int i) const {
    const int k = W::own(i);
    return (training ? fmaf(-slope[k], centred, g - constant[k]) : g) * scale[k];
  }
};

}  // namespace fastres::cuda
