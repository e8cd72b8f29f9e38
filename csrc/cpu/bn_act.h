// Batch norm (+ residual) (+ ReLU), forward and backward, on raw pointers.
//
// An activation is seen as `runs` contiguous runs of `length` values:
//   NHWC: runs = N*H*W, length = C, the channel changes along the run;
//   NCHW: runs = N*C, length = H*W, one channel a run.
// With mean = mean_hi + mean_lo (a double split into a float and the rest), s = weight / sqrt(var + eps):
//   forward   z = (x - mean_hi) * scale + shift + residual      scale = s, shift = bias - mean_lo * s
//             y = relu ? max(z, 0) : z                          NaN stays NaN
//   backward  g = grad_y where not (z <= 0), else 0             z recomputed, or its sign read from a 1-bit mask
//             sum1 = sum g, sum2 = sum g * (x - mean_hi)
//             grad_x = scale * g + slope * (x - mean_hi) + offset
// Ioffe and Szegedy, Batch Normalization, 2015, section 3.
#pragma once

#include <cstdint>

namespace fastres {

struct BnAct {
  int64_t runs, length, channels;
  bool relu;
  const void* x;
  const void* residual;  // forward: added before the activation; may be null
  void* y;               // forward: output. backward: grad_x
  uint8_t* mask;         // forward: written if not null. backward: read if not null
  int64_t mask_stride;   // bytes of mask a run
  const void* grad_y;
  void* grad_residual;  // backward reduce: g is written here if not null
  // Per-channel values, padded to a multiple of 16 floats.
  const float *mean, *scale, *shift;
  const float *slope, *offset;  // null with running statistics
};

// Max-pooling of the activated output, windows of kernel x kernel; x is [images, channels, height, width] in either layout.
struct BnActPool {
  int64_t images, channels, height, width, out_height, out_width;
  int kernel, stride, padding;
  bool relu;
  const void* x;
  void* y;             // forward: pooled output. backward: grad_x
  const void* grad_y;  // like the pooled output
  uint8_t* index;      // which element of the window was the maximum, row by row
  const float *mean, *scale, *shift;
  const float *slope, *offset;  // null with running statistics
};

// All functions work on the range [begin, end) and may run on several threads at once for disjoint ranges.
// Reductions add to sum1[channels], sum2[channels] (doubles, zeroed by the caller).
struct BnActKernels {
  // sum1 = sum (x - mean), sum2 = sum (x - mean)^2; range: runs if NHWC, channels if NCHW (also below).
  void (*statistics)(const BnAct&, int64_t begin, int64_t end, double* sum1, double* sum2);
  void (*apply)(const BnAct&, int64_t begin, int64_t end);  // range: runs
  void (*backward_reduce)(const BnAct&, int64_t begin, int64_t end, double* sum1, double* sum2);
  void (*backward_apply)(const BnAct&, int64_t begin, int64_t end);  // range: runs
};
struct BnActPoolKernels {
  void (*forward)(const BnActPool&, int64_t begin, int64_t end);  // range: rows of the output if NHWC, planes if NCHW
  void (*backward_reduce)(const BnActPool&, int64_t begin, int64_t end, double* sum1, double* sum2);
  void (*backward_apply)(const BnActPool&, int64_t begin, int64_t end);  // range: pixels if NHWC, planes if NCHW
};

// dtype: 0 fp32, 1 bf16, 2 fp16.
const BnActKernels& bn_act_kernels(int dtype, bool channels_last);
const BnActPoolKernels& bn_act_pool_kernels(int dtype, bool channels_last);

}  // namespace fastres
