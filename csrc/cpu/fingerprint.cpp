// fastres_cpu::fingerprint: notices that weights were written to, also by writes that version counters miss; see witness.h.
#include <cstring>

#include "witness.h"

namespace fastres {
namespace {

constexpr int64_t kWhole = 1 << 16;  // tensors of up to this many bytes are read whole

// FNV-1a on 64-bit words, in four lanes so that the multiplications overlap.
class Hash {
 public:
  void add(uint64_t word) {
    lanes_[next_] = mix(lanes_[next_], word);
    next_ = (next_ + 1) & 3;
  }
  void add_memory(const char* data, int64_t bytes) {
    uint64_t words[4];
    for (; bytes >= 32; data += 32, bytes -= 32) {
      std::memcpy(words, data, 32);
      for (int lane = 0; lane < 4; ++lane) lanes_[lane] = mix(lanes_[lane], words[lane]);
    }
    std::memset(words, 0, 32);
    std::memcpy(words, data, bytes);
    for (int lane = 0; lane < 4; ++lane) lanes_[lane] = mix(lanes_[lane], words[lane]);
  }
  uint64_t value() const {
    uint64_t hash = lanes_[0];
    for (int lane = 1; lane < 4; ++lane) hash = mix(hash, lanes_[lane]);
    return hash;
  }

 private:
  static uint64_t mix(uint64_t hash, uint64_t word) {  // the shift brings high bits down, where the product cannot
    hash = (hash ^ word) * 0x100000001b3ull;
    return hash ^ (hash >> 29);
  }
  uint64_t lanes_[4] = {0xcbf29ce484222325ull, 1, 2, 3};
  int next_ = 0;
};

// Whether the values lie without gaps, in whatever order of dimensions.
bool gapless(const Tensor& t) {
  int64_t span = 1;
  for (int64_t d = 0; d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
  return span == t.numel();
}

// One value of each output channel and each input channel at least, at taps in turn.
void add_samples(const Tensor& t, Hash* hash) {
  const char* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t size = static_cast<int64_t>(t.element_size());
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims <= 8 && size <= 8, "unsupported tensor");
  int64_t sizes[8], strides[8], longest = 0, place[8] = {};
  for (int64_t d = 0; d < dims; ++d) {
    sizes[d] = t.size(d);
    strides[d] = t.stride(d);
    longest = sizes[d] > longest ? sizes[d] : longest;
  }
  for (int64_t i = 0; i < longest; ++i) {
    int64_t offset = 0;
    bool step =
        true;  // all dimensions step at once, but the last only when the one before it wraps: so all taps are met
    for (int64_t d = 0; d < dims; ++d) {
      offset += place[d] * strides[d];
      if (d == dims - 1 && !step) continue;
      step = ++place[d] == sizes[d] || d < dims - 2;
      if (place[d] == sizes[d]) place[d] = 0;
    }
    uint64_t bits = 0;
    std::memcpy(&bits, data + offset * size, size);
    hash->add(bits);
  }
}

bool read_whole(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()) <= kWhole && gapless(t); }

}  // namespace

uint64_t fingerprint_of(const Tensor& t) {
  Hash hash;
  const char* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  hash.add(reinterpret_cast<uintptr_t>(data));
  hash.add(static_cast<uint64_t>(bytes));
  for (int64_t d = 0; d < t.dim(); ++d) {  // `w.data = w.data.mT` changes nothing else
    hash.add(static_cast<uint64_t>(t.size(d)));
    hash.add(static_cast<uint64_t>(t.stride(d)));
  }
  if (bytes > 0 && read_whole(t)) {
    hash.add_memory(data, bytes);
  } else if (bytes > 0) {
    add_samples(t, &hash);
  }
  return hash.value();
}

Witness::Witness(const Tensor& t) : tensor_(t), data_(t.const_data_ptr()), dtype_(t.scalar_type()), fingerprint_(0) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    layout_.push_back(t.size(d));
    layout_.push_back(t.stride(d));
  }
  if (read_whole(t)) {
    const char* data = static_cast<const char*>(data_);
    values_.assign(data, data + t.numel() * static_cast<int64_t>(t.element_size()));
  } else {
    fingerprint_ = fingerprint_of(t);
  }
}

bool Witness::holds() const {
  const Tensor& t = tensor_;
  if (t.const_data_ptr() != data_ || t.scalar_type() != dtype_) return false;
  const int64_t dims = static_cast<int64_t>(layout_.size()) / 2;
  if (t.dim() != dims) return false;
  for (int64_t d = 0; d < dims; ++d) {
    if (t.size(d) != layout_[2 * d] || t.stride(d) != layout_[2 * d + 1]) return false;
  }
  if (values_.empty()) return fingerprint_of(t) == fingerprint_;
  return std::memcmp(data_, values_.data(), values_.size()) == 0;
}

namespace {

int64_t fingerprint(const std::vector<Tensor>& tensors) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  std::vector<uint64_t> each(count);
  torch::stable::parallel_for(0, count, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) each[i] = fingerprint_of(tensors[i]);
  });
  Hash hash;
  for (const uint64_t value : each) hash.add(value);
  return static_cast<int64_t>(hash.value());
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) { m.def("fingerprint(Tensor[] tensors) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fastres::fingerprint)); }
