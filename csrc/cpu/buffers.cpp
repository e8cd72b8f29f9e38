#include "buffers.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastres {
namespace {

constexpr int64_t kSmallest = 1 << 20;  // smaller ones stay with the ordinary allocator, which keeps them
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kAlways = 256 << 20;  // so much may be kept whatever was in use

void* system_allocate(int64_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

// Free buffers by size. Never more memory than was in use at one time: what does not fit goes back to the system, oldest sizes
// first, before anything new is asked for.
class Cache {
 public:
  // The size that a buffer for `bytes` has: a few percent more at most, so that nearly equal tensors share buffers.
  static int64_t rounded(int64_t bytes) {
    int64_t step = kSmallest / 8;
    while (step * 16 < bytes) step *= 2;
    return divide_up(bytes, step) * step;
  }

  void* take(int64_t bytes) {
    bytes = rounded(bytes);
    std::vector<void*> dropped;
    void* data = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_ += bytes;
      const auto found = free_.find(bytes);
      if (found != free_.end()) {
        data = found->second;
        free_.erase(found);
        kept_ -= bytes;
      }
      peak_ = used_ > peak_ ? used_ : peak_;
      if (data == nullptr) shrink(std::max(peak_ + peak_ / 4 - used_, kAlways), &dropped);
    }
    for (void* old : dropped) std::free(old);
    return data != nullptr ? data : system_allocate(bytes);
  }

  void give_back(void* data, int64_t bytes) {
    bytes = rounded(bytes);
    std::vector<void*> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_ -= bytes;
      kept_ += bytes;
      free_.emplace(bytes, data);
      shrink(limit_, &dropped);
    }
    for (void* old : dropped) std::free(old);
  }

  void set_limit(int64_t bytes) {
    std::vector<void*> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      limit_ = bytes;
      shrink(limit_, &dropped);
    }
    for (void* old : dropped) std::free(old);
  }

  void empty() {
    std::vector<void*> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      peak_ = used_;
      shrink(0, &dropped);
    }
    for (void* old : dropped) std::free(old);
  }

  int64_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  void shrink(int64_t limit, std::vector<void*>* dropped) {  // the largest go first
    while (kept_ > limit && !free_.empty()) {
      const auto last = std::prev(free_.end());
      kept_ -= last->first;
      dropped->push_back(last->second);
      free_.erase(last);
    }
  }

  std::mutex mutex_;
  std::multimap<int64_t, void*> free_;
  int64_t used_ = 0, kept_ = 0, peak_ = 0, limit_ = int64_t{1} << 40;
};

Cache& cache() {
  static Cache* const one = new Cache;  // never destroyed: tensors may outlive every static object
  return *one;
}

// For tests (guard_buffers): each buffer lies between two guards and is full of NaN, in every dtype. What is written outside of it
// is found when it is given back; a value that is read before it was written shows in the result.
constexpr int64_t kGuard = 4096;
constexpr unsigned char kGuardByte = 0xa5, kNanByte = 0xff;
std::atomic<bool> guarding{false};
std::atomic<int64_t> damaged{0};  // buffers

void* guarded_allocate(int64_t bytes) {
  auto* data = static_cast<unsigned char*>(std::malloc(bytes + 2 * kGuard));
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, kGuardByte, kGuard);
  std::memset(data + kGuard, kNanByte, bytes);
  std::memset(data + kGuard + bytes, kGuardByte, kGuard);
  return data + kGuard;
}

void guarded_free(void* inner, int64_t bytes) {
  auto* data = static_cast<unsigned char*>(inner) - kGuard;
  const auto whole = [](const unsigned char* guard) {
    return std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == kGuardByte; });
  };
  if (!whole(data) || !whole(data + kGuard + bytes)) ++damaged;
  std::free(data);
}

int64_t element_size(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2; }

Tensor from_cache(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                  int64_t bytes) {
  const torch::stable::Device device(torch::headeronly::DeviceType::CPU);
  if (guarding) {
    return torch::stable::from_blob(guarded_allocate(bytes), sizes, strides, device, dtype,
                                    [bytes](void* data) { guarded_free(data, bytes); });
  }
  return torch::stable::from_blob(cache().take(bytes), sizes, strides, device, dtype,
                                  [bytes](void* data) { cache().give_back(data, bytes); });
}

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kCached = INT64_MAX;  // the sanitizer watches the ends of buffers of their own
#else
constexpr int64_t kCached = kSmallest;
#endif

// Whether the ordinary allocator serves a tensor of so many bytes.
bool ordinary(int64_t bytes) { return bytes < kCached && !guarding; }

}  // namespace

Tensor cached_empty(int64_t images, int64_t channels, int64_t height, int64_t width, ScalarType dtype,
                    bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const int64_t plane = height * width, bytes = images * channels * plane * element_size(dtype);
  if (ordinary(bytes)) {
    return torch::stable::empty({images, channels, height, width}, dtype, std::nullopt, std::nullopt, std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  if (channels_last) {
    return from_cache({images, channels, height, width}, {plane * channels, 1, width * channels, channels}, dtype,
                      bytes);
  }
  return from_cache({images, channels, height, width}, {plane * channels, plane, width, 1}, dtype, bytes);
}

Tensor cached_empty_like(const Tensor& x) {
  const int64_t bytes = x.numel() * element_size(x.scalar_type());
  if (ordinary(bytes)) return torch::stable::empty_like(x);
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < x.dim(); ++d) {
    sizes.push_back(x.size(d));
    strides.push_back(x.stride(d));
  }
  return from_cache(sizes, strides, x.scalar_type(), bytes);
}

Tensor cached_empty(int64_t floats) {
  if (ordinary(floats * 4)) return torch::stable::empty({floats}, ScalarType::Float);
  return from_cache({floats}, {1}, ScalarType::Float, floats * 4);
}

Scratch::Scratch(int64_t floats) : bytes_(std::max<int64_t>(floats, 1) * 4), guarded_(guarding) {
  data_ = static_cast<float*>(guarded_           ? guarded_allocate(bytes_)
                              : bytes_ < kCached ? std::malloc(bytes_)
                                                 : cache().take(bytes_));
  if (data_ == nullptr) throw std::bad_alloc();
}
Scratch::~Scratch() {
  if (guarded_) {
    guarded_free(data_, bytes_);
  } else if (bytes_ < kCached) {
    std::free(data_);
  } else {
    cache().give_back(data_, bytes_);
  }
}

void empty_cache() { cache().empty(); }
int64_t cached_bytes() { return cache().kept(); }
void set_cache_limit(int64_t bytes) { cache().set_limit(bytes); }

// Switches the guards of new buffers on or off. Returns how many buffers had damaged ones since the last call.
int64_t guard_buffers(bool on) {
  guarding = on;
  return damaged.exchange(0);
}

}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) {
  m.def("empty_cache() -> ()");
  m.def("cached_bytes() -> int");
  m.def("set_cache_limit(int bytes) -> ()");
  m.def("guard_buffers(bool on) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&fastres::empty_cache));
  m.impl("cached_bytes", TORCH_BOX(&fastres::cached_bytes));
  m.impl("set_cache_limit", TORCH_BOX(&fastres::set_cache_limit));
  m.impl("guard_buffers", TORCH_BOX(&fastres::guard_buffers));
}
