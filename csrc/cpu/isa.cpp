#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastres {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16"};

Isa best() {
#if FASTRES_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = FASTRES_AVX512 && avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

static Isa choose_isa() {
  const char* wanted = std::getenv("FASTRES_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  for (int i = 0; i < 4; ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    if (i > static_cast<int>(best())) {
      throw std::runtime_error("FASTRES_CPU_ISA=" + std::string(wanted) + ", but the best this processor has is " +
                               isa_name(best()));
    }
    return static_cast<Isa>(i);
  }
  throw std::runtime_error("FASTRES_CPU_ISA=" + std::string(wanted) + " is not one of base, avx2, avx512, avx512_bf16");
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace fastres
