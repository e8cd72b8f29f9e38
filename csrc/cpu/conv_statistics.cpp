// fastres_cpu::conv_with_statistics: a convolution, and the mean and variance of each channel of its output.
#include "conv_statistics.h"

#include <algorithm>

#include "conv_methods.h"

namespace fastres {

void BlockSums::reserve(int64_t channels_, int64_t blocks) {
  channels = channels_;
  pixels.assign(blocks, 0);
  values.resize(3 * channels * blocks);
}

// With s1, s2 the sums of d and d^2 for the distances d of a block's n values from its point p, and m the mean of all:
// sum of (p + d - m)^2 = s2 + 2 (p - m) s1 + n (p - m)^2.
void BlockSums::statistics(double* mean, double* var) const {
  const int64_t blocks = static_cast<int64_t>(pixels.size());
  double count = 0;
  std::fill(mean, mean + channels, 0.0);
  std::fill(var, var + channels, 0.0);
  for (int64_t i = 0; i < blocks; ++i) {
    const float *p = values.data() + 3 * channels * i, *s1 = p + channels;
    const double n = static_cast<double>(pixels[i]);
    for (int64_t c = 0; c < channels; ++c) mean[c] += n * p[c] + s1[c];
    count += n;
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] /= count;
  for (int64_t i = 0; i < blocks; ++i) {
    const float *p = values.data() + 3 * channels * i, *s1 = p + channels, *s2 = s1 + channels;
    const double n = static_cast<double>(pixels[i]);
    for (int64_t c = 0; c < channels; ++c) {
      const double from_mean = p[c] - mean[c];
      var[c] += s2[c] + from_mean * (2.0 * s1[c] + n * from_mean);
    }
  }
  for (int64_t c = 0; c < channels; ++c) var[c] = var[c] < 0 ? 0.0 : var[c] / count;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> conv_with_statistics(const Tensor& x, const Tensor& packed,
                                                        const std::vector<int64_t>& weight, const OptionalTensor& bias,
                                                        const std::vector<int64_t>& stride,
                                                        const std::vector<int64_t>& padding,
                                                        const std::vector<int64_t>& dilation, int64_t groups,
                                                        int64_t method) {
  check_dense(x, true, "x");
  const Geometry g({x.size(0), x.size(1), x.size(2), x.size(3)}, weight, stride, padding, dilation, groups);
  STD_TORCH_CHECK(g.pixels() > 0, "x is empty");
  BlockSums sums;
  Tensor y = convolve(x, packed, g, bias, std::nullopt, false, method, &sums);
  Tensor mean = empty_of(x, g.out_channels, ScalarType::Double), var = empty_of(x, g.out_channels, ScalarType::Double);
  double *mean_data = static_cast<double*>(mean.mutable_data_ptr()),
         *var_data = static_cast<double*>(var.mutable_data_ptr());
  if (sums.empty()) {
    batch_statistics(y, true, mean_data, var_data);
  } else {
    sums.statistics(mean_data, var_data);
  }
  return {y, mean, var};
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def(
      "conv_with_statistics(Tensor x, Tensor packed, int[] weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups, int method) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("conv_with_statistics", TORCH_BOX(&fastres::conv_with_statistics));
}
