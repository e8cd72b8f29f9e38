// The Python module fastres._cuda: importing it registers the ops of namespace fastres_cuda, which check, allocate and launch the
// kernels of kernels.h on the current stream. Nothing here waits for the device, so calls can be captured in a CUDA graph.
#include <Python.h>

#include <string>
#include <vector>

#include "binding.h"

namespace fastres::cuda {
namespace {

#ifdef FASTRES_CUDA_ON_CPU
std::string error(int64_t) { return ""; }

int64_t launches() { return cuda_on_cpu::launches; }
#else
// Why the kernels cannot run on a device; empty if they can.
std::string error(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const cudaError_t found = available();
  if (found == cudaSuccess) return "";
  cudaGetLastError();  // so that PyTorch does not find it
  return cudaGetErrorString(found);
}
#endif

struct Statistics {
  Tensor mean, var;
};

// Those of the batch, or room for copies of the running ones. norm gets what to normalise with.
Statistics statistics_of(const Tensor& x, const Shape& shape, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, bool training, Norm* norm, const Queue& queue) {
  Statistics used{empty_of(x, shape.channels, ScalarType::Double), empty_of(x, shape.channels, ScalarType::Double)};
  if (training) {
    const Buffers buffers(x, shape, queue);
    check(statistics(shape, x.const_data_ptr(), data<double>(used.mean), data<double>(used.var), buffers.work, queue));
    norm->mean = {used.mean.const_data_ptr(), Dtype::kDouble};
    norm->var = {used.var.const_data_ptr(), Dtype::kDouble};
  } else {
    STD_TORCH_CHECK(running_mean.has_value() && running_var.has_value(), "running statistics are missing");
    norm->mean = vector_of(running_mean, shape.channels, "running_mean");
    norm->var = vector_of(running_var, shape.channels, "running_var");
  }
  return used;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act(const Tensor& x, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, const OptionalTensor& running_mean,
                                                  const OptionalTensor& running_var, const OptionalTensor& residual,
                                                  bool training, double eps, bool relu, bool save_mask,
                                                  bool channels_last) {
  const Shape shape = shape_of(x, channels_last);
  const Device device(x);
  Norm norm{{}, {}, vector_of(weight, shape.channels, "weight"), vector_of(bias, shape.channels, "bias"), eps};
  const Statistics used = statistics_of(x, shape, running_mean, running_var, training, &norm, device.queue);
  if (residual.has_value()) check_like(*residual, x, channels_last, "residual");
  Tensor y = torch::stable::empty_like(x), mask = empty_of(x, save_mask ? mask_bytes(shape) : 0, ScalarType::Byte);
  Apply args{x.const_data_ptr(),
             residual.has_value() ? residual->const_data_ptr() : nullptr,
             y.mutable_data_ptr(),
             data<uint8_t>(mask),
             nullptr,
             nullptr,
             relu};
  if (!training) args.used_mean = data<double>(used.mean), args.used_var = data<double>(used.var);
  check(apply(shape, norm, args, device.queue));
  return {y, used.mean, used.var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& grad_y, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& var,
                                                           const OptionalTensor& mask, bool training, double eps,
                                                           bool relu, bool need_x, bool need_affine, bool need_residual,
                                                           bool channels_last) {
  const Shape shape = shape_of(x, channels_last);
  check_like(grad_y, x, channels_last, "grad_y");
  const Device device(x);
  const Norm norm{vector_of(mean, shape.channels, "mean"), vector_of(var, shape.channels, "var"),
                  vector_of(weight, shape.channels, "weight"), vector_of(bias, shape.channels, "bias"), eps};
  Gradient gradient{grad_y.const_data_ptr(), x.const_data_ptr(), nullptr, relu ? Relu::kRecomputed : Relu::kNone,
                    training};
  if (mask.has_value()) {
    gradient.mask = mask_of(mask, shape);
    gradient.relu = Relu::kMasked;
  }
  const bool store = need_residual && mask.has_value();  // else it is grad_y itself
  Tensor masked = store ? torch::stable::empty_like(x) : empty_of(x, 0, x.scalar_type());
  const Gradients grads(x, shape.channels, need_affine);
  const float* factors = nullptr;
  if (need_affine || store || (need_x && training)) {
    const Buffers buffers(x, shape, device.queue);
    const Reduced reduced{data<float>(grads.weight), data<float>(grads.bias), data<float>(grads.factors),
                          data<void>(masked)};
    check(backward_reduce(shape, norm, gradient, reduced, buffers.work, device.queue));
    factors = reduced.factors;
  }
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty_of(x, 0, x.scalar_type());
  if (need_x) {
    if (store) gradient.grad_y = masked.const_data_ptr(), gradient.relu = Relu::kNone;  // behind the ReLU already
    check(backward_apply(shape, norm, gradient, factors, grad_x.mutable_data_ptr(), device.queue));
  }
  return {grad_x, grads.weight, grads.bias, masked};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_act(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const Tensor& other, const OptionalTensor& other_weight,
    const OptionalTensor& other_bias, const OptionalTensor& other_running_mean, const OptionalTensor& other_running_var,
    bool training, bool other_training, double eps, double other_eps, bool relu, bool save_mask, bool channels_last) {
  const Shape shape = shape_of(x, channels_last);
  const int64_t channels = shape.channels;
  check_like(other, x, channels_last, "other");
  const Device device(x);
  Norm norm{{}, {}, vector_of(weight, channels, "weight"), vector_of(bias, channels, "bias"), eps};
  Norm other_norm{{},
                  {},
                  vector_of(other_weight, channels, "other_weight"),
                  vector_of(other_bias, channels, "other_bias"),
                  other_eps};
  const Statistics used = statistics_of(x, shape, running_mean, running_var, training, &norm, device.queue);
  const Statistics other_used =
      statistics_of(other, shape, other_running_mean, other_running_var, other_training, &other_norm, device.queue);
  Tensor y = torch::stable::empty_like(x), mask = empty_of(x, save_mask ? mask_bytes(shape) : 0, ScalarType::Byte);
  const auto branch = [](const Tensor& of, const Norm& with, const Statistics& copies, bool own) {
    return Branch{of.const_data_ptr(), with, own ? nullptr : data<double>(copies.mean),
                  own ? nullptr : data<double>(copies.var)};
  };
  check(join(shape, branch(x, norm, used, training), branch(other, other_norm, other_used, other_training),
             y.mutable_data_ptr(), data<uint8_t>(mask), relu, device.queue));
  return {y, used.mean, used.var, other_used.mean, other_used.var, mask};
}

// One branch in the backward of bn_add_bn_act: its results, and what the kernels take.
struct BranchOf {
  Gradients grads;
  Tensor grad_x;
  BranchGradient kernel;
  BranchOf(const Tensor& x, const Shape& shape, const OptionalTensor& weight, const Tensor& mean, const Tensor& var,
           bool training, double eps, bool need_x, bool need_affine)
      : grads(x, shape.channels, need_affine),
        grad_x(need_x ? torch::stable::empty_like(x) : empty_of(x, 0, x.scalar_type())),
        kernel{x.const_data_ptr(),
               {vector_of(mean, shape.channels, "mean"),
                vector_of(var, shape.channels, "var"),
                vector_of(weight, shape.channels, "weight"),
                {nullptr, Dtype::kFloat},
                eps},
               training,
               {data<float>(grads.weight), data<float>(grads.bias), data<float>(grads.factors), nullptr},
               data<void>(grad_x)} {
    if (!need_affine && !(need_x && training)) kernel.reduced.factors = nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_act_backward(
    const Tensor& grad_y, const Tensor& x, const OptionalTensor& weight, const Tensor& mean, const Tensor& var,
    const Tensor& other, const OptionalTensor& other_weight, const Tensor& other_mean, const Tensor& other_var,
    const OptionalTensor& mask, bool training, bool other_training, double eps, double other_eps, bool need_x,
    bool need_affine, bool need_other, bool need_other_affine, bool channels_last) {
  const Shape shape = shape_of(x, channels_last);
  check_like(grad_y, x, channels_last, "grad_y");
  check_like(other, x, channels_last, "other");
  const uint8_t* kept = mask_of(mask, shape);
  const Device device(x);
  BranchOf one(x, shape, weight, mean, var, training, eps, need_x, need_affine);
  BranchOf two(other, shape, other_weight, other_mean, other_var, other_training, other_eps, need_other,
               need_other_affine);
  if (one.kernel.reduced.factors || two.kernel.reduced.factors) {
    const Buffers buffers(x, shape, device.queue, 3);
    check(
        join_backward_reduce(shape, grad_y.const_data_ptr(), kept, one.kernel, two.kernel, buffers.work, device.queue));
  }
  if (need_x || need_other) {
    check(join_backward_apply(shape, grad_y.const_data_ptr(), kept, one.kernel, two.kernel, device.queue));
  }
  return {one.grad_x, one.grads.weight, one.grads.bias, two.grad_x, two.grads.weight, two.grads.bias};
}

Tensor add_act_op(const Tensor& x, const Tensor& residual, bool relu, bool channels_last) {
  const Shape shape = shape_of(x, channels_last);
  check_like(residual, x, channels_last, "residual");
  const Device device(x);
  Tensor y = torch::stable::empty_like(x);
  check(add_act(shape.dtype, x.numel(), x.const_data_ptr(), residual.const_data_ptr(), y.mutable_data_ptr(), relu,
                device.queue));
  return y;
}

Tensor add_act_backward_op(const Tensor& grad_y, const Tensor& y, bool channels_last) {
  const Shape shape = shape_of(y, channels_last);
  check_like(grad_y, y, channels_last, "grad_y");
  const Device device(y);
  Tensor grad_x = torch::stable::empty_like(y);
  check(add_act_backward(shape.dtype, y.numel(), grad_y.const_data_ptr(), y.const_data_ptr(), grad_x.mutable_data_ptr(),
                         device.queue));
  return grad_x;
}

Window window_of(const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(
      kernel >= 1 && kernel <= 15 && stride >= 1 && stride <= 1 << 20 && padding >= 0 && padding <= kernel / 2,
      "unsupported pooling window");
  const auto pooled = [&](int64_t size) {
    return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
  };
  const Window window{x.size(2),
                      x.size(3),
                      pooled(x.size(2)),
                      pooled(x.size(3)),
                      static_cast<int>(kernel),
                      static_cast<int>(stride),
                      static_cast<int>(padding)};
  STD_TORCH_CHECK(window.out_height > 0 && window.out_width > 0, "the pooled output would be empty");
  return window;
}

// A tensor of the pooled shape, like y, is dense.
void check_pooled(const Tensor& t, const Tensor& x, const Window& window, bool channels_last, const char* name) {
  check_dense(t, channels_last, name);
  STD_TORCH_CHECK(t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == window.out_height &&
                      t.size(3) == window.out_width,
                  name, " must have the pooled shape");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_maxpool(const Tensor& x, const OptionalTensor& weight,
                                                          const OptionalTensor& bias,
                                                          const OptionalTensor& running_mean,
                                                          const OptionalTensor& running_var, bool training, double eps,
                                                          bool relu, int64_t kernel, int64_t stride, int64_t padding,
                                                          bool channels_last) {
  const Shape shape = shape_of(x, channels_last);
  const Window window = window_of(x, kernel, stride, padding);
  const Device device(x);
  Norm norm{{}, {}, vector_of(weight, shape.channels, "weight"), vector_of(bias, shape.channels, "bias"), eps};
  const Statistics used = statistics_of(x, shape, running_mean, running_var, training, &norm, device.queue);
  const auto empty = [&](ScalarType dtype) {
    using torch::headeronly::MemoryFormat;
    return torch::stable::empty({x.size(0), x.size(1), window.out_height, window.out_width}, dtype, std::nullopt,
                                x.device(), std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  };
  Tensor y = empty(x.scalar_type()), index = empty(ScalarType::Byte);
  Pool args{x.const_data_ptr(), y.mutable_data_ptr(), data<uint8_t>(index), nullptr, nullptr, relu};
  if (!training) args.used_mean = data<double>(used.mean), args.used_var = data<double>(used.var);
  check(maxpool(shape, window, norm, args, device.queue));
  return {y, used.mean, used.var, index};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_maxpool_backward(const Tensor& grad_y, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& var, const Tensor& index,
                                                           bool training, double eps, bool relu, int64_t kernel,
                                                           int64_t stride, int64_t padding, bool need_x,
                                                           bool need_affine, bool channels_last) {
  const Shape shape = shape_of(x, channels_last);
  const Window window = window_of(x, kernel, stride, padding);
  check_pooled(grad_y, x, window, channels_last, "grad_y");
  check_pooled(index, x, window, channels_last, "index");
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && index.scalar_type() == ScalarType::Byte,
                  "dtypes do not match");
  const Device device(x);
  const Norm norm{vector_of(mean, shape.channels, "mean"), vector_of(var, shape.channels, "var"),
                  vector_of(weight, shape.channels, "weight"), vector_of(bias, shape.channels, "bias"), eps};
  const Gradient gradient{grad_y.const_data_ptr(), x.const_data_ptr(), nullptr, relu ? Relu::kRecomputed : Relu::kNone,
                          training};
  const uint8_t* places = static_cast<const uint8_t*>(index.const_data_ptr());
  const Gradients grads(x, shape.channels, need_affine);
  const float* factors = nullptr;
  if (need_affine || (need_x && training)) {
    const Buffers buffers(x, shape, device.queue);
    const Reduced reduced{data<float>(grads.weight), data<float>(grads.bias), data<float>(grads.factors), nullptr};
    check(maxpool_backward_reduce(shape, window, norm, gradient, places, reduced, buffers.work, device.queue));
    factors = reduced.factors;
  }
  Tensor grad_x = need_x ? torch::stable::empty_like(x) : empty_of(x, 0, x.scalar_type());
  if (need_x) {
    check(maxpool_backward_apply(shape, window, norm, gradient, places, factors, grad_x.mutable_data_ptr(),
                                 device.queue));
  }
  return {grad_x, grads.weight, grads.bias};
}

Update update_of(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
                 const OptionalTensor& num_batches_tracked, double momentum, int64_t count) {
  const int64_t channels = mean.numel();
  STD_TORCH_CHECK(mean.scalar_type() == ScalarType::Double && var.scalar_type() == ScalarType::Double &&
                      mean.is_contiguous() && var.is_contiguous() && var.numel() == channels,
                  "mean and var must be contiguous float64 tensors of one size");
  STD_TORCH_CHECK(running_mean.scalar_type() == running_var.scalar_type() && running_mean.dim() == 1 &&
                      running_var.dim() == 1 && running_mean.numel() == channels && running_var.numel() == channels,
                  "running statistics must be vectors of ", channels, " values of one dtype");
  STD_TORCH_CHECK(!num_batches_tracked.has_value() ||
                      (num_batches_tracked->scalar_type() == ScalarType::Long && num_batches_tracked->numel() == 1),
                  "num_batches_tracked must be one int64");
  const Running running{running_mean.mutable_data_ptr(), running_var.mutable_data_ptr(),
                        dtype_of(running_mean, "running_mean"), running_mean.stride(0), running_var.stride(0)};
  const void* tracked = num_batches_tracked.has_value() ? num_batches_tracked->const_data_ptr() : nullptr;
  return {running,
          static_cast<const double*>(mean.const_data_ptr()),
          static_cast<const double*>(var.const_data_ptr()),
          static_cast<const int64_t*>(tracked),
          momentum,
          channels,
          count};
}

void update_running_stats_op(Tensor& running_mean, Tensor& running_var, const Tensor& mean, const Tensor& var,
                             const OptionalTensor& num_batches_tracked, double momentum, int64_t count) {
  const Update update = update_of(running_mean, running_var, mean, var, num_batches_tracked, momentum, count);
  const Device device(mean);
  check(update_running_stats(&update, 1, device.queue));
}

void update_all_running_stats(std::vector<Tensor> running_means, std::vector<Tensor> running_vars,
                              std::vector<Tensor> means, std::vector<Tensor> vars, std::vector<double> momenta,
                              std::vector<int64_t> counts) {
  const size_t layers = means.size();
  STD_TORCH_CHECK(running_means.size() == layers && running_vars.size() == layers && vars.size() == layers &&
                      momenta.size() == layers && counts.size() == layers,
                  "the lists must have one length");
  if (layers == 0) return;
  std::vector<Update> updates;
  for (size_t i = 0; i < layers; ++i) {
    for (const Tensor* t : {&running_means[i], &running_vars[i], &means[i], &vars[i]}) {
      STD_TORCH_CHECK(t->get_device_index() == means[0].get_device_index(), "all tensors must be on one device");
    }
    updates.push_back(
        update_of(running_means[i], running_vars[i], means[i], vars[i], std::nullopt, momenta[i], counts[i]));
  }
  const Device device(means[0]);
  check(update_running_stats(updates.data(), static_cast<int64_t>(layers), device.queue));
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY(fastres_cuda, m) {
  m.def("error(int device) -> str");
  m.def(
      "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, "
      "bool training, float eps, bool relu, bool save_mask, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? mask, "
      "bool training, float eps, bool relu, bool need_x, bool need_affine, bool need_residual, bool channels_last) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_add_bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor other, "
      "Tensor? other_weight, Tensor? other_bias, Tensor? other_running_mean, Tensor? other_running_var, bool training, "
      "bool other_training, float eps, float other_eps, bool relu, bool save_mask, bool channels_last) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_add_bn_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor mean, Tensor var, Tensor other, "
      "Tensor? other_weight, Tensor other_mean, Tensor other_var, Tensor? mask, bool training, bool other_training, "
      "float eps, float other_eps, bool need_x, bool need_affine, bool need_other, bool need_other_affine, "
      "bool channels_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("add_act(Tensor x, Tensor residual, bool relu, bool channels_last) -> Tensor");
  m.def("add_act_backward(Tensor grad_y, Tensor y, bool channels_last) -> Tensor");
  m.def(
      "bn_act_maxpool(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
      "float eps, bool relu, int kernel, int stride, int padding, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bn_act_maxpool_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor index, "
      "bool training, float eps, bool relu, int kernel, int stride, int padding, bool need_x, bool need_affine, "
      "bool channels_last) -> (Tensor, Tensor, Tensor)");
  m.def(
      "update_running_stats_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
      "Tensor? num_batches_tracked, float momentum, int count) -> ()");
  m.def(
      "update_all_running_stats_(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor[] means, Tensor[] vars, "
      "float[] momenta, int[] counts) -> ()");
#ifdef FASTRES_CUDA_ON_CPU
  m.def("launches() -> int");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CompositeExplicitAutograd, m) {
  m.impl("error", TORCH_BOX(&fastres::cuda::error));
#ifdef FASTRES_CUDA_ON_CPU
  m.impl("launches", TORCH_BOX(&fastres::cuda::launches));
#endif
}

#ifdef FASTRES_CUDA_ON_CPU
STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastres_cuda, CUDA, m) {
#endif
  m.impl("bn_act", TORCH_BOX(&fastres::cuda::bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&fastres::cuda::bn_act_backward));
  m.impl("bn_add_bn_act", TORCH_BOX(&fastres::cuda::bn_add_bn_act));
  m.impl("bn_add_bn_act_backward", TORCH_BOX(&fastres::cuda::bn_add_bn_act_backward));
  m.impl("add_act", TORCH_BOX(&fastres::cuda::add_act_op));
  m.impl("add_act_backward", TORCH_BOX(&fastres::cuda::add_act_backward_op));
  m.impl("bn_act_maxpool", TORCH_BOX(&fastres::cuda::bn_act_maxpool));
  m.impl("bn_act_maxpool_backward", TORCH_BOX(&fastres::cuda::bn_act_maxpool_backward));
  m.impl("update_running_stats_", TORCH_BOX(&fastres::cuda::update_running_stats_op));
  m.impl("update_all_running_stats_", TORCH_BOX(&fastres::cuda::update_all_running_stats));
}

extern "C" PyObject* PyInit__cuda(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
