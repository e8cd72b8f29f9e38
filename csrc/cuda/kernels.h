// The CUDA kernels, launched on raw device pointers. Nothing here or in a .cu file needs PyTorch.
//
// Batch norm (Ioffe and Szegedy 2015), the residual, the ReLU, with the mean split into a float and the rest (near, mean - near):
//   forward   z = (x - near) * scale + shift + residual        scale = weight / sqrt(var + eps)
//             y = relu ? max(z, 0) : z                         shift = bias + (near - mean) * scale
//   backward  g = grad_y where not (z <= 0), else 0            z computed again, or its sign read from a 1-bit mask
//             grad_x = scale * (g - constant - slope * (x - near))
// NaN is not <= 0: it passes, as in eager. Every sum has a fixed order: results repeat bit for bit on the same device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastres::cuda {

enum class Dtype { kFloat, kBFloat16, kHalf, kDouble };

// A dense activation: images x pixels rows of `channels` values in channels_last, images x channels rows of `pixels` else.
// A 1-bit mask has a row for each, from a byte of its own. Activations are not kDouble.
struct Shape {
  int64_t images, channels, pixels;
  bool channels_last;
  Dtype dtype;
};

// A value a channel, contiguous; data may be null where the comment at its use says so.
struct Vector {
  const void* data;
  Dtype dtype;
};

struct Norm {
  Vector mean, var;
  Vector weight, bias;  // may be null: 1 and 0
  double eps;
};

// Where and how kernels run. The number of multiprocessors decides how sums are cut.
struct Queue {
  int multiprocessors;
  cudaStream_t stream;
  // Bytes of shared memory of a multiprocessor, and of a block at most; 0: nothing is kept there between two passes.
  int64_t shared = 0, shared_block = 0;
};

// Memory of a reduction: `floats(...)` values of any content, and `counters(...)` that are 0 and are left so. Two launches
// that may run at the same time must not share it.
struct Workspace {
  float* partial;
  unsigned* tickets;
  static int64_t floats(const Shape& shape, const Queue& queue,
                        int sums);  // sums of a channel: 2, join_backward_reduce 3
  static int64_t counters(const Shape& shape);
};

// Whether the current device can run what was compiled: its driver is new enough, its architecture among ours.
cudaError_t available();

// Mean and biased variance of every channel over images and pixels.
cudaError_t statistics(const Shape& shape, const void* x, double* mean, double* var, const Workspace& work,
                       const Queue& queue);

// y = act(batch_norm(x) + residual), both optional. mask: which values the ReLU lets through; may be null.
// used_mean, used_var: copies of norm.mean and norm.var; may be null.
struct Apply {
  const void *x, *residual;
  void* y;
  uint8_t* mask;
  double *used_mean, *used_var;
  bool relu;
};
cudaError_t apply(const Shape& shape, const Norm& norm, const Apply& args, const Queue& queue);

// Where the gradient of a ReLU comes from: there is none, its input is computed again from x, or a mask.
enum class Relu { kNone, kRecomputed, kMasked };

struct Gradient {
  const void *grad_y, *x;
  const uint8_t* mask;  // with kMasked
  Relu relu;
  bool training;  // batch statistics were used: grad_x has the terms by which x moved them
};

// grad_weight = sum g * x_hat and grad_bias = sum g (both null or neither), g itself (may be null), and for
// backward_apply `factors`, 3 floats a channel: scale, constant, slope (may be null; so may they there, with running
// statistics).
struct Reduced {
  float *grad_weight, *grad_bias, *factors;
  void* masked;
};
cudaError_t backward_reduce(const Shape& shape, const Norm& norm, const Gradient& gradient, const Reduced& reduced,
                            const Workspace& work, const Queue& queue);
// From the last rows to the first: what the reduction read last is still in the cache.
cudaError_t backward_apply(const Shape& shape, const Norm& norm, const Gradient& gradient, const float* factors,
                           void* grad_x, const Queue& queue);

// Both passes in one launch, with what they read twice kept on the chip in between. For batch statistics, channels_last with a
// multiple of 8 channels, and pointers that are multiples of 16; an error where it does not fit.
bool fits_on_chip(const Shape& shape, bool backward, const Queue& queue);
// statistics and apply: norm.mean and norm.var are not read, args.used_mean and args.used_var not written.
cudaError_t persistent(const Shape& shape, const Norm& norm, const Apply& args, double* mean, double* var,
                       const Workspace& work, const Queue& queue);
// backward_reduce and backward_apply, with `factors`.
cudaError_t persistent_backward(const Shape& shape, const Norm& norm, const Gradient& gradient, const Reduced& reduced,
                                void* grad_x, const Workspace& work, const Queue& queue);

// The end of a block with a projection: y = act(batch_norm(x) + batch_norm(x of the other branch)). mask as in Apply.
struct Branch {
  const void* x;
  Norm norm;
  double *used_mean, *used_var;  // as in Apply
};
cudaError_t join(const Shape& shape, const Branch& branch, const Branch& other, void* y, uint8_t* mask, bool relu,
                 const Queue& queue);

// Its backward: g is grad_y where the mask has a bit, or grad_y if there is no mask.
struct BranchGradient {
  const void* x;
  Norm norm;  // without a bias
  bool training;
  Reduced reduced;  // masked is null; without `factors` the reduction leaves this branch alone
  void* grad_x;     // may be null
};
cudaError_t join_backward_reduce(const Shape& shape, const void* grad_y, const uint8_t* mask,
                                 const BranchGradient& branch, const BranchGradient& other, const Workspace& work,
                                 const Queue& queue);
// As backward_apply, with the `factors` of either branch.
cudaError_t join_backward_apply(const Shape& shape, const void* grad_y, const uint8_t* mask,
                                const BranchGradient& branch, const BranchGradient& other, const Queue& queue);

// y = act(x + residual); grad_x = grad_y where not (y <= 0). size: of a dense activation in any layout.
cudaError_t add_act(Dtype dtype, int64_t size, const void* x, const void* residual, void* y, bool relu,
                    const Queue& queue);
cudaError_t add_act_backward(Dtype dtype, int64_t size, const void* grad_y, const void* y, void* grad_x,
                             const Queue& queue);

// Max-pooling of act(batch_norm(x)), windows of kernel x kernel (up to 15); NaN is the largest value. `shape` is x's.
struct Window {
  int64_t height, width, out_height, out_width;
  int kernel, stride, padding;
};
// index: which element of its window each maximum was, row by row.
struct Pool {
  const void* x;
  void* y;
  uint8_t* index;
  double *used_mean, *used_var;  // as in Apply
  bool relu;
};
cudaError_t maxpool(const Shape& shape, const Window& window, const Norm& norm, const Pool& args, const Queue& queue);
// gradient.grad_y is that of the pooled output, gradient.relu kNone or kRecomputed; reduced.masked is null.
cudaError_t maxpool_backward_reduce(const Shape& shape, const Window& window, const Norm& norm,
                                    const Gradient& gradient, const uint8_t* index, const Reduced& reduced,
                                    const Workspace& work, const Queue& queue);
cudaError_t maxpool_backward_apply(const Shape& shape, const Window& window, const Norm& norm, const Gradient& gradient,
                                   const uint8_t* index, const float* factors, void* grad_x, const Queue& queue);

// running = (1 - f) * running + f * batch, with the unbiased variance of `count` values; f = momentum, or
// 1 / *num_batches_tracked if that is not null. Strides in values.
struct Running {
  void *mean, *var;
  Dtype dtype;
  int64_t mean_stride, var_stride;
};
struct Update {
  Running running;
  const double *mean, *var;
  const int64_t* num_batches_tracked;
  double momentum;
  int64_t channels, count;
};
// Of many layers, none of them twice: one launch for every 40.
cudaError_t update_running_stats(const Update* updates, int64_t layers, const Queue& queue);

}  // namespace fastres::cuda
