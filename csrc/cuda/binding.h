// What the bindings of the CUDA kernels share: the device and the stream of a call, tensors as kernels see them, memory.
//
// With FASTRES_CUDA_ON_CPU the ops serve CPU tensors, by the kernels that tests compile for the CPU.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "checks.h"
#include "kernels.h"

#ifndef FASTRES_CUDA_ON_CPU
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#pragma GCC visibility push(hidden)  // as the tensors in it
namespace fastres::cuda {

inline void check(cudaError_t error) {
#ifdef FASTRES_CUDA_ON_CPU
  STD_TORCH_CHECK(error == cudaSuccess, "fastres_cuda: error ", static_cast<int>(error));
#else
  STD_TORCH_CHECK(error == cudaSuccess, "fastres_cuda: ", cudaGetErrorString(error));
#endif
}

#ifdef FASTRES_CUDA_ON_CPU
struct Device {
  Queue queue{1, nullptr};
  explicit Device(const Tensor&) {}
};

inline Tensor tickets(const Tensor& like, int64_t count, const Queue&) {
  return torch::stable::new_zeros(like, {count}, ScalarType::Int);
}
#else
// What a device has; without a stream.
inline Queue chip(int device) {
  static std::mutex mutex;
  static std::map<int, Queue> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  Queue made{attribute(cudaDevAttrMultiProcessorCount), nullptr};
  if (attribute(cudaDevAttrCooperativeLaunch) != 0) {
    made.shared = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    made.shared_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }
  return known[device] = made;
}

// The device of a tensor is current while this lives.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  Queue queue;
  explicit Device(const Tensor& x) : guard(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    queue = chip(x.get_device_index());
    queue.stream = static_cast<cudaStream_t>(stream);
  }
};

// Counters that are 0. Those of a stream are kept: kernels of one stream use them one after another, and leave them 0. A graph
// that is captured has its own, for it may run beside any stream.
inline Tensor tickets(const Tensor& like, int64_t count, const Queue& queue) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(queue.stream, &capturing));
  if (capturing != cudaStreamCaptureStatusNone) return torch::stable::new_zeros(like, {count}, ScalarType::Int);
  static std::mutex mutex;
  static auto* kept = new std::map<std::pair<int, cudaStream_t>, Tensor>;  // never freed: CUDA may be gone at exit
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<int, cudaStream_t> key{like.get_device_index(), queue.stream};
  const auto found = kept->find(key);
  if (found != kept->end() && found->second.numel() >= count) return found->second;
  const int64_t room = count > 1024 ? count : 1024;
  Tensor made = torch::stable::new_zeros(like, {room}, ScalarType::Int);
  kept->insert_or_assign(key, made);
  return made;
}
#endif

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::Double: return Dtype::kDouble;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
  return Dtype::kFloat;
}

inline Shape shape_of(const Tensor& x, bool channels_last) {
  check_dense(x, channels_last, "x");
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "fastres_cuda serves float32, bfloat16 and float16");
  return {x.size(0), x.size(1), x.size(2) * x.size(3), channels_last, dtype_of(x, "x")};
}

inline Vector vector_of(const OptionalTensor& t, int64_t channels, const char* name) {
  if (!t.has_value()) return {nullptr, Dtype::kFloat};
  STD_TORCH_CHECK(t->is_contiguous() && t->numel() == channels, name, " must be a contiguous tensor of ", channels,
                  " values");
  return {t->const_data_ptr(), dtype_of(*t, name)};
}

template <class T>
T* data(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<T*>(t.mutable_data_ptr());
}

// Memory of one reduction; it belongs to the stream's order like any tensor.
struct Buffers {
  Tensor partial, counters;
  Workspace work;
  Buffers(const Tensor& like, const Shape& shape, const Queue& queue, int sums = 2)
      : partial(empty_of(like, Workspace::floats(shape, queue, sums), ScalarType::Float)),
        counters(tickets(like, Workspace::counters(shape), queue)),
        work{data<float>(partial), data<unsigned>(counters)} {}
};

inline int64_t mask_bytes(const Shape& shape) {
  const int64_t rows = shape.images * (shape.channels_last ? shape.pixels : shape.channels);
  return rows * (((shape.channels_last ? shape.channels : shape.pixels) + 7) / 8);
}

inline const uint8_t* mask_of(const OptionalTensor& mask, const Shape& shape) {
  if (!mask.has_value()) return nullptr;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->numel() == mask_bytes(shape),
                  "mask does not belong to x");
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

// What backward ops return beside grad_x, and memory for the factors of grad_x.
struct Gradients {
  Tensor weight, bias, factors;
  Gradients(const Tensor& x, int64_t channels, bool need_affine)
      : weight(empty_of(x, need_affine ? channels : 0, ScalarType::Float)),
        bias(empty_of(x, need_affine ? channels : 0, ScalarType::Float)),
        factors(empty_of(x, 3 * channels, ScalarType::Float)) {}
};

}  // namespace fastres::cuda
#pragma GCC visibility pop
