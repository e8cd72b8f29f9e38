// The mean and variance of each channel of a convolution's output, from sums over blocks of it that are taken while a block is in
// registers or in the cache: batch norm need not read the output from memory for them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace fastres {

struct GemmConv;

// Which outputs form a block depends on the shape alone, and blocks are added in order: the statistics do not depend on the number
// of threads. Each block has a point of its own, the mean of a few of its values: sums of distances to it do not cancel when the mean
// is large.
struct BlockSums {
  int64_t channels = 0;
  std::vector<int64_t> pixels;  // of a block
  std::vector<double>
      values;  // [block][3][channel]: the point, the sum of the distances to it, the sum of their squares

  bool empty() const { return pixels.empty(); }
  double* block(int64_t i) { return values.data() + 3 * channels * i; }
  void reserve(int64_t channels, int64_t blocks);
  // What run_gemm has to call for each of its blocks.
  std::function<void(int64_t, int64_t, int64_t)> gather(const GemmConv& conv, int64_t blocks);
  // Biased variance.
  void statistics(double* mean, double* var) const;
};

}  // namespace fastres
