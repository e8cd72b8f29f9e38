// What all bindings share: tensors of the Stable ABI, and checks of them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fastres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `channels_last` says how x lies in memory; the caller has made x dense in that layout.
inline void check_dense(const Tensor& x, bool channels_last, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must have 4 dimensions, has ", x.dim());
  if (!channels_last) {
    STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
    return;
  }
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const bool dense = (c == 1 || x.stride(1) == 1) && (w == 1 || x.stride(3) == c) && (h == 1 || x.stride(2) == w * c) &&
                     (x.size(0) == 1 || x.stride(0) == h * w * c);
  STD_TORCH_CHECK(dense, name, " must be dense in channels_last layout");
}
inline void check_like(const Tensor& t, const Tensor& x, bool channels_last, const char* name) {
  check_dense(t, channels_last, name);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(t.size(i) == x.size(i), name, " must have the shape of x");
}

inline Tensor empty_of(const Tensor& like, int64_t n, ScalarType dtype) {
  return torch::stable::new_empty(like, {n}, dtype);
}

}  // namespace fastres
