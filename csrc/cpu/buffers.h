// Large buffers that are used again instead of going back to the operating system: fresh memory costs a page fault every 4 KB,
// which is more time than many of the passes that write into it (25 to 50 MB at batch 16).
#pragma once

#include "common.h"

namespace fastres {

// Uninitialised tensors; large ones lie in a buffer of the cache, which gets it back when the last tensor on it dies.
Tensor cached_empty(int64_t images, int64_t channels, int64_t height, int64_t width, ScalarType dtype,
                    bool channels_last);
Tensor cached_empty_like(const Tensor& x);  // x is dense
Tensor cached_empty(int64_t floats);

// Memory for a kernel's own use.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
  int64_t bytes_;
  bool guarded_;  // between guards, for tests
};

}  // namespace fastres
