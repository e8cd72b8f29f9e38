// fastres_cpu::add_act and its backward: parallel loops over the kernels of add_act.h.
#include "add_act.h"

#include "buffers.h"
#include "common.h"

namespace fastres {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values a thread takes at least

// The caller has made both tensors dense in one layout, so that equal offsets are equal places.
void check_pair(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.numel() == b.numel(),
                  "both tensors must have one dtype and shape");
}

Tensor add_act(const Tensor& x, const Tensor& residual, bool relu) {
  check_pair(x, residual);
  Tensor y = cached_empty_like(x);
  const AddActKernels& kernels = add_act_kernels(dtype_index(x));
  const void *a = x.const_data_ptr(), *b = residual.const_data_ptr();
  void* out = y.mutable_data_ptr();
  torch::stable::parallel_for(0, x.numel(), kGrain,
                              [&](int64_t begin, int64_t end) { kernels.forward(a, b, out, relu, begin, end); });
  return y;
}

Tensor add_act_backward(const Tensor& grad_y, const Tensor& y) {
  check_pair(grad_y, y);
  Tensor grad = cached_empty_like(y);
  const AddActKernels& kernels = add_act_kernels(dtype_index(y));
  const void *g = grad_y.const_data_ptr(), *active = y.const_data_ptr();
  void* out = grad.mutable_data_ptr();
  torch::stable::parallel_for(0, y.numel(), kGrain,
                              [&](int64_t begin, int64_t end) { kernels.backward(g, active, out, begin, end); });
  return grad;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def("add_act(Tensor x, Tensor residual, bool relu) -> Tensor");
  m.def("add_act_backward(Tensor grad_y, Tensor y) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) {
  m.impl("add_act", TORCH_BOX(&fastres::add_act));
  m.impl("add_act_backward", TORCH_BOX(&fastres::add_act_backward));
}
