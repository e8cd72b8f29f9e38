// What a tensor was like: notices writes that version counters miss (.data, inference tensors).
#pragma once

#include "common.h"

namespace fastres {

// Of the place, the layout and the values: of all values of a small tensor, and of samples of a large one that touch every output
// and input channel.
uint64_t fingerprint_of(const Tensor& t);

// A tensor, and what it was like. A small one is compared value by value, a large one by its fingerprint.
class __attribute__((visibility("hidden"))) Witness {  // as Tensor is
 public:
  explicit Witness(const Tensor& t);
  bool holds() const;
  bool whole() const { return !values_.empty(); }
  int64_t cost() const { return 256 + static_cast<int64_t>(values_.size()); }  // in bytes that `holds` reads, about

 private:
  Tensor tensor_;
  const void* data_;
  std::vector<int64_t> layout_;  // sizes and strides
  ScalarType dtype_;
  std::vector<char> values_;
  uint64_t fingerprint_;
};

}  // namespace fastres
