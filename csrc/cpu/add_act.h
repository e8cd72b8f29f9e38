// y = relu ? max(a + b, 0) : a + b, and its gradient, on flat arrays of the same layout.
#pragma once

#include <cstdint>

namespace fastres {

struct AddActKernels {
  void (*forward)(const void* a, const void* b, void* y, bool relu, int64_t begin, int64_t end);
  // grad = grad_y where not (y <= 0), else 0.
  void (*backward)(const void* grad_y, const void* y, void* grad, int64_t begin, int64_t end);
};

// dtype: 0 fp32, 1 bf16, 2 fp16.
const AddActKernels& add_act_kernels(int dtype);

}  // namespace fastres
