// The mean and variance of each channel of a convolution's output, from sums over blocks of it that are taken while a block is in
// registers or in the cache: batch norm need not read the output from memory for them.
#pragma once

#include <cstdint>
#include <vector>

namespace fastres {

// Which outputs form a block depends on the shape alone, and blocks are added in order: the statistics do not depend on the number
// of threads.
struct BlockSums {
  int64_t channels = 0;
  std::vector<int64_t> pixels;  // of a block
  std::vector<float> values;    // [block][3][channel]: `sums` of conv.h

  bool empty() const { return pixels.empty(); }
  float* block(int64_t i) { return values.data() + 3 * channels * i; }
  void reserve(int64_t channels, int64_t blocks);
  // Biased variance.
  void statistics(double* mean, double* var) const;
};

}  // namespace fastres
