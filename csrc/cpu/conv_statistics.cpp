// fastres_cpu::conv_with_statistics: a convolution, and the mean and variance of each channel of its output.
#include "conv_statistics.h"

#include <algorithm>
#include <cmath>

#include "bn_act.h"
#include "conv_methods.h"

namespace fastres {

void BlockSums::reserve(int64_t channels_, int64_t blocks) {
  channels = channels_;
  pixels.assign(blocks, 0);
  values.resize(3 * channels * blocks);
}

std::function<void(int64_t, int64_t, int64_t)> BlockSums::gather(const GemmConv& conv, int64_t blocks) {
  reserve(conv.channels, blocks);
  return [this, conv](int64_t i, int64_t begin, int64_t end) {
    constexpr int64_t kSamples = 4;
    double *near = block(i), *sum1 = near + channels, *sum2 = sum1 + channels;
    std::fill(near, near + 3 * channels, 0.0);
    std::vector<float> point(padded_channels(channels));
    for (int64_t s = 0; s < kSamples; ++s) {
      const int64_t pixel = begin + (end - begin) * s / kSamples;
      to_float_kernel(conv.y_dtype)(element(conv.y, conv.y_dtype, pixel * channels), channels, point.data());
      for (int64_t c = 0; c < channels; ++c) near[c] += point[c] / kSamples;
    }
    for (int64_t c = 0; c < channels; ++c) {
      point[c] = std::isfinite(near[c]) ? static_cast<float>(near[c]) : 0.0f;
      near[c] = point[c];
    }
    BnAct args{};
    args.channels = args.length = channels;
    args.runs = end;
    args.x = conv.y;
    args.mean = point.data();
    bn_act_kernels(conv.y_dtype, true).statistics(args, begin, end, sum1, sum2);
    pixels[i] = end - begin;
  };
}

// With d the distances to a block's point p, and m the mean: sum of (p + d - m)^2 = sum d^2 + 2 (p - m) sum d + n (p - m)^2.
void BlockSums::statistics(double* mean, double* var) const {
  double count = 0;
  std::fill(mean, mean + channels, 0.0);
  std::fill(var, var + channels, 0.0);
  const double* block = values.data();
  for (const int64_t n : pixels) {
    for (int64_t c = 0; c < channels; ++c) mean[c] += static_cast<double>(n) * block[c] + block[channels + c];
    count += static_cast<double>(n);
    block += 3 * channels;
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] /= count;
  block = values.data();
  for (const int64_t n : pixels) {
    for (int64_t c = 0; c < channels; ++c) {
      const double from_mean = block[c] - mean[c];
      var[c] += block[2 * channels + c] + from_mean * (2 * block[channels + c] + static_cast<double>(n) * from_mean);
    }
    block += 3 * channels;
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
