// Storage types of activations. Arithmetic is fp32 always; the conversions of one vector are in vec.inl.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastres {

// dtype: 0 fp32, 1 bf16, 2 fp16.
inline int64_t value_bytes(int dtype) { return dtype == 0 ? 4 : 2; }
inline const void* element(const void* values, int dtype, int64_t i) {
  return static_cast<const char*>(values) + i * value_bytes(dtype);
}
inline void* element(void* values, int dtype, int64_t i) { return static_cast<char*>(values) + i * value_bytes(dtype); }

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// IEEE half to and from float without F16C instructions.
inline float half_to_float(F16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1fu;
  uint32_t mantissa = h.bits & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {  // Inf, NaN
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // zero, subnormal: mantissa * 2^-24, exact in float
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline F16 float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // quiet NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;                       // rounds to Inf: 65520 and above
  } else if (magnitude >= 0x38800000u) {  // normal half: round the 13 dropped bits to nearest even
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  } else {  // subnormal half: adding 0.5 lets the float unit round at the right bit
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000u;
  }
  return F16{static_cast<uint16_t>(sign | half)};
}

}  // namespace fastres
