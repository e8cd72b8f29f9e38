// Instruction-set regions: one source, compiled once per instruction set, chosen once at load.
//
// A file that has kernels puts them into an .inl file and includes foreach_isa.h; functions defined inside a region carry the
// region's target, nothing else does. All #include <...> must come before the first region, so that no inline function of a
// header is ever emitted with AVX-512 (per-file -mavx512f flags fall into that trap).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#define FASTRES_X86 1
#else
#define FASTRES_X86 0
#endif
#ifndef FASTRES_AVX512  // 0 leaves these regions out: half of the time to compile, for a build that serves its own machine
#define FASTRES_AVX512 FASTRES_X86
#endif

#define FASTRES_STRINGIFY(x) #x
#if defined(__clang__)
#define FASTRES_TARGET_BEGIN(t) \
  _Pragma(FASTRES_STRINGIFY(clang attribute push(__attribute__((target(t))), apply_to = function)))
#define FASTRES_TARGET_END _Pragma("clang attribute pop")
#else
#define FASTRES_TARGET_BEGIN(t) _Pragma("GCC push_options") _Pragma(FASTRES_STRINGIFY(GCC target(t)))
#define FASTRES_TARGET_END _Pragma("GCC pop_options")
#endif

namespace fastres {

enum class Isa : int { base = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The instruction set in use: the best the processor has, or what FASTRES_CPU_ISA asks for. Decided once per process.
// Throws std::runtime_error when FASTRES_CPU_ISA names something unknown or something this processor lacks.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace fastres
