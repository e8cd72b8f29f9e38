// fastres_cpu::classify: global average pooling and the linear layer behind it. For small networks, where the two calls would take
// longer than several convolutions.
#include "classify.h"

#include "conv_methods.h"

namespace fastres {

void classify(const Classifier& c, const float* x, int64_t begin, int64_t end, float* y) {
  std::vector<double> sums(c.channels);
  for (int64_t image = begin; image < end; ++image) {
    std::fill(sums.begin(), sums.end(), 0.0);
    const float* pixel = x + image * c.pixels * c.channels;
    for (int64_t i = 0; i < c.pixels; ++i, pixel += c.channels) {
      for (int64_t k = 0; k < c.channels; ++k) sums[k] += pixel[k];
    }
    for (int64_t k = 0; k < c.classes; ++k) {
      const float* row = c.weight + k * c.channels;
      double sum = 0.0;
      for (int64_t i = 0; i < c.channels; ++i) sum += sums[i] * row[i];
      sum = sum / static_cast<double>(c.pixels) + (c.bias ? c.bias[k] : 0.0);
      y[image * c.classes + k] = static_cast<float>(sum);
    }
  }
}

namespace {

Tensor classify_tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const float* data = fp32(nhwc(x, "x"));
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                      weight.size(1) == x.size(1) && x.size(2) * x.size(3) > 0,
                  "weight must be a contiguous float32 matrix [classes, channels of x]");
  const Classifier c{x.size(2) * x.size(3), x.size(1), weight.size(0),
                     static_cast<const float*>(weight.const_data_ptr()), floats(bias, weight.size(0), "bias")};
  Tensor y = torch::stable::empty({x.size(0), c.classes}, ScalarType::Float);
  float* out = static_cast<float*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, x.size(0), 4, [&](int64_t begin, int64_t end) { classify(c, data, begin, end, out); });
  return y;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) { m.def("classify(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("classify", TORCH_BOX(&fastres::classify_tensor)); }
