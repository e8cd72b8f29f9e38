// Second moments of activations [pixels][channels] and quadratic forms of them, on raw pointers; all sums in double.
#pragma once

#include <cstdint>

namespace fastres {

struct GramKernels {
  int64_t lanes;
  // Adds, of the `pixels` pixels of x, the sums of d = x - point to first[channels] and those of d_i * d_j, i <= j at least, to
  // second[padded][padded], where `padded` is channels rounded up to lanes. scratch: pixels * padded.
  void (*moments)(const float* x, int64_t channels, const double* point, int64_t pixels, double* scratch, double* first,
                  double* second);
  // Of rows [begin, end) of weight [rows][channels]: out[row] = w^T S w for a symmetric S = covariance[channels][channels], which
  // `pack` has put into packed (padded * (padded + lanes) / 2 doubles).
  void (*pack)(const double* covariance, int64_t channels, double* packed);
  void (*quadratic_forms)(const float* weight, int64_t channels, const double* packed, int64_t begin, int64_t end,
                          double* out);
  // The 1-bit mask of values that a ReLU let through, from its output of each dtype; rows of (channels + 7) / 8 bytes.
  void (*mask_of_relu[3])(const void* y, int64_t channels, int64_t begin, int64_t end, uint8_t* mask);
};

const GramKernels& gram_kernels();

}  // namespace fastres
