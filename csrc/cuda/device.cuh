// What all kernels are made of: storage types, 16-byte accesses, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

// FASTRES_SHARED(Type, name): a variable of the block; FASTRES_SHARED_BYTES(name): a pointer to as many bytes as the launch
// gives it. tests/cuda_on_cpu/cuda_on_cpu.h has its own, of the heap, where a sanitizer sees their bounds.
#ifndef FASTRES_CUDA_ON_CPU
#define FASTRES_SHARED(type, name) __shared__ type name
#define FASTRES_SHARED_BYTES(name) extern __shared__ uint4 name[]
#endif

namespace fastres::cuda {

#ifndef FASTRES_CUDA_ON_CPU
// A value that another block changes. It orders nothing by itself: see __threadfence.
__device__ inline unsigned peek(const unsigned* p) { return *static_cast<const volatile unsigned*>(p); }
#endif

constexpr int kThreads = 256, kWarp = 32;
constexpr int kResident =
    2;  // blocks of a multiprocessor at least, so 128 registers a thread; without it some kernels spill
constexpr int kWide = 8;  // values of a thread: one byte of a mask, 16 or 32 bytes of an activation

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

// Two values at once: one instruction where there is one.
__device__ inline void from_float(float a, float b, float* out) { out[0] = a, out[1] = b; }
__device__ inline void from_float(float a, float b, __nv_bfloat16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  out[0] = pair.x, out[1] = pair.y;
}
__device__ inline void from_float(float a, float b, __half* out) {
  const __half2 pair = __floats2half2_rn(a, b);
  out[0] = pair.x, out[1] = pair.y;
}

// kWidth consecutive values as they lie in memory; kWidth is 1 or kWide.
template <class T, int kWidth>
struct Pack {
  T values[kWidth];
  __device__ float operator[](int i) const { return to_float(values[i]); }
};

template <int kWidth, class T>
__device__ inline Pack<T, kWidth> load(const T* p) {
  Pack<T, kWidth> pack;
  if constexpr (kWidth == 1) {
    pack.values[0] = *p;
  } else {
    uint4 raw[sizeof pack / sizeof(uint4)];
    for (int i = 0; i < static_cast<int>(sizeof pack / sizeof(uint4)); ++i) {
      raw[i] = reinterpret_cast<const uint4*>(p)[i];
    }
    memcpy(static_cast<void*>(&pack), raw, sizeof pack);
  }
  return pack;
}

template <class T, int kWidth>
__device__ inline Pack<T, kWidth> rounded(const float (&values)[kWidth]) {
  Pack<T, kWidth> pack;
  if constexpr (kWidth == 1) {
    T pair[2];
    from_float(values[0], values[0], pair);
    pack.values[0] = pair[0];
  } else {
    for (int i = 0; i < kWidth; i += 2) from_float(values[i], values[i + 1], pack.values + i);
  }
  return pack;
}

template <int kWidth, class T>
__device__ inline void store(T* p, const float (&values)[kWidth]) {
  const Pack<T, kWidth> pack = rounded<T>(values);
  if constexpr (kWidth == 1) {
    *p = pack.values[0];
  } else {
    uint4 raw[sizeof pack / sizeof(uint4)];
    memcpy(raw, &pack, sizeof pack);
    // Not *p = raw: the compiler splits some of those into stores of 4 bytes.
    for (int i = 0; i < static_cast<int>(sizeof pack / sizeof(uint4)); ++i) {
      __stwb(reinterpret_cast<uint4*>(p) + i, raw[i]);
    }
  }
}

__device__ inline double value_of(const Vector& v, int64_t i) {
  switch (v.dtype) {
    case Dtype::kDouble: return static_cast<const double*>(v.data)[i];
    case Dtype::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(v.data)[i]);
    case Dtype::kHalf: return to_float(static_cast<const __half*>(v.data)[i]);
    default: return static_cast<const float*>(v.data)[i];
  }
}

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a / b for a, b >= 0: a division of 64 bits takes ten times as long as one of 32.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, [[maybe_unused]] const Queue& queue,
                   const Arguments&... arguments) {
#ifdef FASTRES_CUDA_ON_CPU
  return cuda_on_cpu::launch(grid, kThreads, [=] { kernel(arguments...); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = queue.stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

// The same with `shared` bytes of memory for each block, and all blocks running at once, so that they may wait for each other.
template <class... Parameters, class... Arguments>
cudaError_t launch_together(void (*kernel)(Parameters...), dim3 grid, int64_t shared,
                            [[maybe_unused]] const Queue& queue, const Arguments&... arguments) {
#ifdef FASTRES_CUDA_ON_CPU
  return cuda_on_cpu::launch_together(grid, kThreads, static_cast<size_t>(shared), [=] { kernel(arguments...); });
#else
  // It is a limit of the kernel; without this it is 48 KB.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = queue.stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

// Whether all pointers may be accessed 16 bytes at a time; null may.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % sizeof(uint4) == 0) && ...);
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>) with the storage type of an activation.
template <class F>
cudaError_t with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat: return f(Type<float>{});
    case Dtype::kBFloat16: return f(Type<__nv_bfloat16>{});
    case Dtype::kHalf: return f(Type<__half>{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace fastres::cuda
