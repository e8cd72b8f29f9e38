// fastres_cpu::bn_act_maxpool and its backward: parallel loops over the pooling kernels of bn_act.h.
#include "bn_act.h"
#include "buffers.h"
#include "common.h"

#include <cstring>

namespace fastres {
namespace {

int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

BnActPool describe(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding, bool relu) {
  // A pixel lies in at most ceil(kernel / stride)^2 windows, and kMaxWindows of bn_act_maxpool.inl is 16.
  STD_TORCH_CHECK(kernel >= 1 && kernel <= 15 && stride >= 1 && divide_up(kernel, stride) <= 4 && padding >= 0 &&
                      padding <= kernel / 2,
                  "unsupported pooling window");
  const Shape shape(x);
  BnActPool args{};
  args.images = shape.images;
  args.channels = shape.channels;
  args.height = shape.height;
  args.width = shape.width;
  args.out_height = pooled(shape.height, kernel, stride, padding);
  args.out_width = pooled(shape.width, kernel, stride, padding);
  STD_TORCH_CHECK(args.out_height > 0 && args.out_width > 0, "the pooled output would be empty");
  args.kernel = static_cast<int>(kernel);
  args.stride = static_cast<int>(stride);
  args.padding = static_cast<int>(padding);
  args.relu = relu;
  args.x = x.const_data_ptr();
  return args;
}

// The pooled tensor, of the given dtype.
Tensor empty_pooled(const BnActPool& args, ScalarType dtype, bool channels_last) {
  return cached_empty(args.images, args.channels, args.out_height, args.out_width, dtype, channels_last);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_maxpool(const Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias,
                                                          const OptionalTensor& running_mean,
                                                          const OptionalTensor& running_var, bool training, double eps,
                                                          bool relu, int64_t kernel, int64_t stride, int64_t padding,
                                                          bool channels_last) {
  check_dense(x, channels_last, "x");
  const int64_t channels = x.size(1);
  BnActPool args = describe(x, kernel, stride, padding, relu);
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
  Tensor y = empty_pooled(args, x.scalar_type(), channels_last);
  Tensor index = empty_pooled(args, ScalarType::Byte, channels_last);
  args.y = y.mutable_data_ptr();
  args.index = static_cast<uint8_t*>(index.mutable_data_ptr());
  Parameters parameters(channels, mean_data, var_data, floats(weight, channels, "weight"),
                        floats(bias, channels, "bias"), eps);
  parameters.give(&args, training);
  const BnActPoolKernels& kernels = bn_act_pool_kernels(dtype_index(x), channels_last);
  const int64_t rows = channels_last ? args.images * args.out_height : args.images * channels;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
  return {y, mean, var, index};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_maxpool_backward(const Tensor& grad_y, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& var, const Tensor& index,
                                                           bool training, double eps, bool relu, int64_t kernel,
                                                           int64_t stride, int64_t padding, bool need_x,
                                                           bool need_affine, bool channels_last) {
  check_dense(x, channels_last, "x");
  check_dense(grad_y, channels_last, "grad_y");
  check_dense(index, channels_last, "index");
  const Shape shape(x);
  const int64_t channels = shape.channels;
  BnActPool args = describe(x, kernel, stride, padding, relu);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && index.scalar_type() == ScalarType::Byte,
                  "dtypes do not match");
  const int64_t expected[4] = {args.images, channels, args.out_height, args.out_width};
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(grad_y.size(i) == expected[i] && index.size(i) == expected[i],
                    "grad_y and index must have the pooled shape");
  }
  args.grad_y = grad_y.const_data_ptr();
  args.index = const_cast<uint8_t*>(static_cast<const uint8_t*>(index.const_data_ptr()));
  const float* weight_data = floats(weight, channels, "weight");
  Parameters parameters(channels, doubles(mean, channels, "mean"), doubles(var, channels, "var"), weight_data,
                        floats(bias, channels, "bias"), eps);
  parameters.give(&args, training);
  const BnActPoolKernels& kernels = bn_act_pool_kernels(dtype_index(x), channels_last);
  Tensor grad_weight = empty_of(x, need_affine ? channels : 0, ScalarType::Float);
  Tensor grad_bias = empty_of(x, need_affine ? channels : 0, ScalarType::Float);
  if (need_affine || (need_x && training)) {
    const Sums sums = reduce(shape, channels_last, [&](int64_t begin, int64_t end, double* sum1, double* sum2) {
      kernels.backward_reduce(args, begin, end, sum1, sum2);
    });
    parameters.set_gradients(sums, static_cast<double>(shape.count()), training, weight_data,
                             need_affine ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr,
                             need_affine ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr);
  }
  Tensor grad_x = need_x ? cached_empty_like(x) : empty_of(x, 0, x.scalar_type());
  if (need_x) {
    args.y = grad_x.mutable_data_ptr();
    const int64_t runs = channels_last ? shape.count() : shape.images * channels;
    parallel_chunks(runs, channels_last ? channels : shape.plane(),
                    [&](int64_t begin, int64_t end) { kernels.backward_apply(args, begin, end); });
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def(
      "bn_act_maxpool(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
      "float eps, bool relu, int kernel, int stride, int padding, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_act_maxpool_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor index, "
      "bool training, float eps, bool relu, int kernel, int stride, int padding, bool need_x, bool need_affine, "
      "bool channels_last) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("bn_act_maxpool", TORCH_BOX(&fastres::bn_act_maxpool));
  m.impl("bn_act_maxpool_backward", TORCH_BOX(&fastres::bn_act_maxpool_backward));
}
