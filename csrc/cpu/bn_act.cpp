// fastres_cpu::bn_act, its backward and the parts of both: checks, allocation, parallel loops over the kernels of bn_act.h.
#include "bn_act.h"

#include "buffers.h"
#include "common.h"
#include "storage.h"

namespace fastres {
namespace {

float value_at(const void* p, int dtype, int64_t i) {
  if (dtype == 0) return static_cast<const float*>(p)[i];
  if (dtype == 2) return half_to_float(static_cast<const F16*>(p)[i]);
  const uint32_t bits = static_cast<uint32_t>(static_cast<const BF16*>(p)[i].bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

BnAct describe(const Tensor& x, bool channels_last, bool relu) {
  const Shape shape(x);
  BnAct args{};
  args.channels = shape.channels;
  args.runs = channels_last ? shape.count() : shape.images * shape.channels;
  args.length = channels_last ? shape.channels : shape.plane();
  args.relu = relu;
  args.x = x.const_data_ptr();
  args.mask_stride = divide_up(args.length, 8);
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act(const Tensor& x, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                  const OptionalTensor& running_var, const OptionalTensor& residual,
                                                  bool training, double eps, bool relu, bool save_mask,
                                                  bool channels_last) {
  check_dense(x, channels_last, "x");
  const int64_t channels = x.size(1);
  BnAct args = describe(x, channels_last, relu);
  Tensor y = cached_empty_like(x);
  Tensor mean = empty_of(x, channels, ScalarType::Double), var = empty_of(x, channels, ScalarType::Double);
  double* mean_data = static_cast<double*>(mean.mutable_data_ptr());
  double* var_data = static_cast<double*>(var.mutable_data_ptr());
  if (training) {
    batch_statistics(x, channels_last, mean_data, var_data);
  } else {
    STD_TORCH_CHECK(running_mean.has_value() && running_var.has_value(), "running statistics are missing");
    std::memcpy(mean_data, doubles(*running_mean, channels, "running_mean"), channels * sizeof(double));
    std::memcpy(var_data, doubles(*running_var, channels, "running_var"), channels * sizeof(double));
  }
  if (residual.has_value()) {
    check_like(*residual, x, channels_last, "residual");
    args.residual = residual->const_data_ptr();
  }
  Tensor mask = empty_of(x, save_mask ? args.runs * args.mask_stride : 0, ScalarType::Byte);
  if (save_mask) args.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  args.y = y.mutable_data_ptr();
  Parameters parameters(channels, mean_data, var_data, floats(weight, channels, "weight"),
                        floats(bias, channels, "bias"), eps);
  parameters.give(&args, training);
  const BnActKernels& kernels = bn_act_kernels(dtype_index(x), channels_last);
  parallel_chunks(args.runs, args.length, [&](int64_t begin, int64_t end) { kernels.apply(args, begin, end); });
  return {y, mean, var, mask};
}

BnAct describe_backward(const Tensor& grad_y, const Tensor& x, const OptionalTensor& mask, bool channels_last,
                        bool relu) {
  check_dense(x, channels_last, "x");
  check_like(grad_y, x, channels_last, "grad_y");
  BnAct args = describe(x, channels_last, relu);
  args.grad_y = grad_y.const_data_ptr();
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->numel() == args.runs * args.mask_stride,
                    "mask does not belong to x");
    args.mask = const_cast<uint8_t*>(static_cast<const uint8_t*>(mask->const_data_ptr()));
  }
  return args;
}

Tensor input_gradient(BnAct args, const BnActKernels& kernels, const Tensor& x) {
  Tensor grad_x = cached_empty_like(x);
  args.y = grad_x.mutable_data_ptr();
  const Chunks chunks(args.runs, args.length);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = last - 1; chunk >= first; --chunk) {  // backwards: the end of the reduction is still cached
      kernels.backward_apply(args, chunks.begin(chunk), chunks.end(chunk, args.runs));
    }
  });
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& grad_y, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& var,
                                                           const OptionalTensor& mask, bool training, double eps,
                                                           bool relu, bool need_x, bool need_affine, bool need_residual,
                                                           bool channels_last) {
  BnAct args = describe_backward(grad_y, x, mask, channels_last, relu);
  const Shape shape(x);
  const int64_t channels = shape.channels;
  const float* weight_data = floats(weight, channels, "weight");
  Parameters parameters(channels, doubles(mean, channels, "mean"), doubles(var, channels, "var"), weight_data,
                        floats(bias, channels, "bias"), eps);
  parameters.give(&args, training);
  const BnActKernels& kernels = bn_act_kernels(dtype_index(x), channels_last);
  // Only a masked gradient differs from grad_y and has to be stored for the residual.
  const bool store_gradient = need_residual && mask.has_value();
  Tensor grad_residual = store_gradient ? cached_empty_like(x) : empty_of(x, 0, x.scalar_type());
  if (store_gradient) args.grad_residual = grad_residual.mutable_data_ptr();
  Tensor grad_weight = empty_of(x, need_affine ? channels : 0, ScalarType::Float);
  Tensor grad_bias = empty_of(x, need_affine ? channels : 0, ScalarType::Float);
  if (need_affine || store_gradient || (need_x && training)) {
    const Sums sums = reduce(shape, channels_last, [&](int64_t begin, int64_t end, double* sum1, double* sum2) {
      kernels.backward_reduce(args, begin, end, sum1, sum2);
    });
    parameters.set_gradients(sums, static_cast<double>(shape.count()), training, weight_data,
                             need_affine ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr,
                             need_affine ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr);
  }
  if (need_x && store_gradient) {  // already masked: read it instead of grad_y and the mask
    args.grad_y = grad_residual.const_data_ptr();
    args.grad_residual = nullptr;
    args.mask = nullptr;
    args.relu = false;
  }
  Tensor grad_x = need_x ? input_gradient(args, kernels, x) : empty_of(x, 0, x.scalar_type());
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

// Where the statistics are those of more values than x has (synchronised batch norm): the two halves of the above.

std::tuple<Tensor, Tensor> bn_statistics(const Tensor& x, bool channels_last) {
  check_dense(x, channels_last, "x");
  Tensor mean = empty_of(x, x.size(1), ScalarType::Double), var = empty_of(x, x.size(1), ScalarType::Double);
  batch_statistics(x, channels_last, static_cast<double*>(mean.mutable_data_ptr()),
                   static_cast<double*>(var.mutable_data_ptr()));
  return {mean, var};
}

// grad_x; grad_weight, grad_bias: over all `count` values a channel that the statistics are of.
Tensor bn_act_backward_apply(const Tensor& grad_y, const Tensor& x, const OptionalTensor& weight,
                             const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                             const OptionalTensor& mask, const Tensor& grad_weight, const Tensor& grad_bias,
                             double count, double eps, bool relu, bool channels_last) {
  BnAct args = describe_backward(grad_y, x, mask, channels_last, relu);
  const int64_t channels = x.size(1);
  const float* weight_data = floats(weight, channels, "weight");
  Parameters parameters(channels, doubles(mean, channels, "mean"), doubles(var, channels, "var"), weight_data,
                        floats(bias, channels, "bias"), eps);
  parameters.give(&args, true);
  const double *grad_w = doubles(grad_weight, channels, "grad_weight"),
               *grad_b = doubles(grad_bias, channels, "grad_bias");
  for (int64_t c = 0; c < channels; ++c) parameters.set_terms(c, grad_w[c], grad_b[c], count, weight_data);
  return input_gradient(args, bn_act_kernels(dtype_index(x), channels_last), x);
}

}  // namespace

// Sums of (x - point) do not cancel when the mean is large.
std::vector<float> reference_points(const Tensor& x, bool channels_last) {
  constexpr int64_t kSamples = 8;
  const Shape shape(x);
  const int dtype = dtype_index(x);
  const void* data = x.const_data_ptr();
  std::vector<float> points(divide_up(shape.channels, 16) * 16);
  const int64_t samples = shape.count() < kSamples ? shape.count() : kSamples;
  for (int64_t c = 0; c < shape.channels; ++c) {
    double sum = 0;
    int finite = 0;
    for (int64_t s = 0; s < samples; ++s) {
      const int64_t pixel = s * shape.count() / samples;
      const int64_t image = pixel / shape.plane(), place = pixel % shape.plane();
      const float value =
          value_at(data, dtype,
                   channels_last ? pixel * shape.channels + c : (image * shape.channels + c) * shape.plane() + place);
      if (!std::isfinite(value)) continue;
      sum += value;
      ++finite;
    }
    points[c] = finite ? static_cast<float>(sum / finite) : 0.0f;
  }
  return points;
}

void batch_statistics(const Tensor& x, bool channels_last, double* mean, double* var) {
  const Shape shape(x);
  BnAct args = describe(x, channels_last, false);
  const std::vector<float> points = reference_points(x, channels_last);
  args.mean = points.data();
  const BnActKernels& kernels = bn_act_kernels(dtype_index(x), channels_last);
  const Sums sums = reduce(shape, channels_last, [&](int64_t begin, int64_t end, double* sum1, double* sum2) {
    kernels.statistics(args, begin, end, sum1, sum2);
  });
  const double count = static_cast<double>(shape.count());
  for (int64_t c = 0; c < shape.channels; ++c) {
    const double distance = sums.first[c] / count, square = sums.second[c] / count - distance * distance;
    mean[c] = points[c] + distance;
    var[c] = square < 0 ? 0.0 : square;
  }
}

}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def(
      "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, "
      "bool training, float eps, bool relu, bool save_mask, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? mask, "
      "bool training, float eps, bool relu, bool need_x, bool need_affine, bool need_residual, bool channels_last) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("bn_statistics(Tensor x, bool channels_last) -> (Tensor, Tensor)");
  m.def(
      "bn_act_backward_apply(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? mask, "
      "Tensor grad_weight, Tensor grad_bias, float count, float eps, bool relu, bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("bn_act", TORCH_BOX(&fastres::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&fastres::bn_act_backward));
  m.impl("bn_statistics", TORCH_BOX(&fastres::bn_statistics));
  m.impl("bn_act_backward_apply", TORCH_BOX(&fastres::bn_act_backward_apply));
}
