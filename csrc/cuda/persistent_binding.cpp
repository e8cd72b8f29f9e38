// The ops of persistent.cu.
#include <string>

#include "binding.h"

namespace fastres::cuda {
namespace {

#ifdef FASTRES_CUDA_ON_CPU
constexpr Queue kChip{4, nullptr, 228 << 10, 227 << 10};  // of eight blocks at once

bool fits(int64_t, bool backward, const Shape& shape) { return fits_on_chip(shape, backward, kChip); }

Queue queue_of(const Device&) { return kChip; }
#else
bool fits(int64_t device, bool backward, const Shape& shape) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const bool found = fits_on_chip(shape, backward, chip(static_cast<int>(device)));
  cudaGetLastError();  // so that PyTorch does not find what made it false
  return found;
}

Queue queue_of(const Device& device) { return device.queue; }
#endif

bool fits_on_chip_op(int64_t device, const std::string& dtype, int64_t images, int64_t channels, int64_t pixels,
                     bool backward) {
  const Dtype known[] = {Dtype::kFloat, Dtype::kBFloat16, Dtype::kHalf};
  const char* names[] = {"float32", "bfloat16", "float16"};
  for (int i = 0; i < 3; ++i) {
    if (dtype == names[i]) return fits(device, backward, {images, channels, pixels, true, known[i]});
  }
  return false;
}

void check_fits(cudaError_t error) {
  STD_TORCH_CHECK(error != cudaErrorInvalidValue,
                  "fastres_cuda: the activation does not fit on the chip, or is not a multiple of 16 bytes");
  check(error);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act(const Tensor& x, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, const OptionalTensor& residual,
                                                  double eps, bool relu, bool save_mask) {
  const Shape shape = shape_of(x, true);
  if (residual.has_value()) check_like(*residual, x, true, "residual");
  const Device device(x);
  const Queue queue = queue_of(device);
  const Norm norm{{}, {}, vector_of(weight, shape.channels, "weight"), vector_of(bias, shape.channels, "bias"), eps};
  Tensor y = torch::stable::empty_like(x), mask = empty_of(x, save_mask ? mask_bytes(shape) : 0, ScalarType::Byte),
         mean = empty_of(x, shape.channels, ScalarType::Double), var = empty_of(x, shape.channels, ScalarType::Double);
  const Apply args{x.const_data_ptr(),
                   residual.has_value() ? residual->const_data_ptr() : nullptr,
                   y.mutable_data_ptr(),
                   data<uint8_t>(mask),
                   nullptr,
                   nullptr,
                   relu};
  const Buffers buffers(x, shape, queue);
  check_fits(persistent(shape, norm, args, data<double>(mean), data<double>(var), buffers.work, queue));
  return {y, mean, var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& grad_y, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& var,
                                                           const OptionalTensor& mask, double eps, bool relu,
                                                           bool need_affine, bool need_residual) {
  const Shape shape = shape_of(x, true);
  check_like(grad_y, x, true, "grad_y");
  const Device device(x);
  const Queue queue = queue_of(device);
  const Norm norm{vector_of(mean, shape.channels, "mean"), vector_of(var, shape.channels, "var"),
                  vector_of(weight, shape.channels, "weight"), vector_of(bias, shape.channels, "bias"), eps};
  Gradient gradient{grad_y.const_data_ptr(), x.const_data_ptr(), nullptr, relu ? Relu::kRecomputed : Relu::kNone, true};
  if (mask.has_value()) {
    gradient.mask = mask_of(mask, shape);
    gradient.relu = Relu::kMasked;
  }
  const bool store = need_residual && mask.has_value();  // else it is grad_y itself
  Tensor grad_x = torch::stable::empty_like(x),
         masked = store ? torch::stable::empty_like(x) : empty_of(x, 0, x.scalar_type());
  const Gradients grads(x, shape.channels, need_affine);
  const Reduced reduced{data<float>(grads.weight), data<float>(grads.bias), data<float>(grads.factors),
                        data<void>(masked)};
  const Buffers buffers(x, shape, queue);
  check_fits(persistent_backward(shape, norm, gradient, reduced, grad_x.mutable_data_ptr(), buffers.work, queue));
  return {grad_x, grads.weight, grads.bias, masked};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cuda, m) {
  m.def("fits_on_chip(int device, str dtype, int images, int channels, int pixels, bool backward) -> bool");
  m.def(
      "bn_act_persistent(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu, "
      "bool save_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_act_persistent_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
      "Tensor? mask, float eps, bool relu, bool need_affine, bool need_residual) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) {
  m.impl("fits_on_chip", TORCH_BOX(&fastres::cuda::fits_on_chip_op));
}

#ifdef FASTRES_CUDA_ON_CPU
STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CUDA, m) {
#endif
  m.impl("bn_act_persistent", TORCH_BOX(&fastres::cuda::bn_act));
  m.impl("bn_act_persistent_backward", TORCH_BOX(&fastres::cuda::bn_act_backward));
}
