// fastres_cpu::fingerprint: notices that weights were written to, also by writes that version counters miss (.data, inference
// tensors). It reads every value of a small tensor, and of a large one samples that touch every output and input channel.
#include "common.h"

#include <cstring>

namespace fastres {
namespace {

constexpr int64_t kWhole = 4096;  // tensors up to this many values are read whole

uint64_t mix(uint64_t hash, uint64_t value) {  // FNV-1a on 64-bit words, with a shift so that high bits come down
  hash = (hash ^ value) * 0x100000001b3ull;
  return hash ^ (hash >> 29);
}

uint64_t value_bits(const char* data, int64_t offset, int64_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, data + offset * size, size);
  return bits;
}

int64_t fingerprint(const std::vector<Tensor>& tensors) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const Tensor& t : tensors) {
    const char* data = static_cast<const char*>(t.const_data_ptr());
    const int64_t size = static_cast<int64_t>(t.element_size());
    hash = mix(hash, reinterpret_cast<uintptr_t>(data));
    hash = mix(hash, static_cast<uint64_t>(t.numel()));
    STD_TORCH_CHECK(size <= 8, "unsupported element size");
    const int64_t dims = t.dim();
    if (t.numel() == 0) continue;
    if (dims != 4) {
      const int64_t step = dims == 1 ? t.stride(0) : 1, count = dims == 1 ? t.size(0) : 1;
      for (int64_t i = 0; i < count; ++i) hash = mix(hash, value_bits(data, i * step, size));
      continue;
    }
    const int64_t k = t.size(0), c = t.size(1), r = t.size(2), s = t.size(3);
    const int64_t samples = t.numel() <= kWhole ? t.numel() : (k > c ? k : c);
    for (int64_t i = 0; i < samples; ++i) {
      // Small tensors: all places in order. Large ones: channel i of both kinds, taps in turn.
      const bool whole = samples == t.numel();
      const int64_t out = whole ? i / (c * r * s) : i % k, in = whole ? i / (r * s) % c : i % c;
      const int64_t tap = i % (r * s);
      hash = mix(
          hash,
          value_bits(data, out * t.stride(0) + in * t.stride(1) + tap / s * t.stride(2) + tap % s * t.stride(3), size));
    }
  }
  return static_cast<int64_t>(hash);
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_cpu, m) { m.def("fingerprint(Tensor[] tensors) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fastres_cpu, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fastres::fingerprint)); }
