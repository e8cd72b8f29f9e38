// Includes FASTRES_KERNELS (an .inl file) once per instruction set, each in its own namespace and target region.
// Define FASTRES_KERNELS before including this file; pick at run time with FASTRES_PICK_ISA(name). No include guard, on purpose.
#include "isa.h"

namespace fastres {
namespace base {
#define FASTRES_LEVEL 0
#include "vec.inl"
#include FASTRES_KERNELS
#undef FASTRES_LEVEL
}  // namespace base

#if FASTRES_X86
FASTRES_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#define FASTRES_LEVEL 1
#include "vec.inl"
#include FASTRES_KERNELS
#undef FASTRES_LEVEL
}  // namespace avx2
FASTRES_TARGET_END
#endif

#if FASTRES_AVX512
FASTRES_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#define FASTRES_LEVEL 2
#include "vec.inl"
#include FASTRES_KERNELS
#undef FASTRES_LEVEL
}  // namespace avx512
FASTRES_TARGET_END

FASTRES_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
namespace avx512_bf16 {
#define FASTRES_LEVEL 3
#include "vec.inl"
#include FASTRES_KERNELS
#undef FASTRES_LEVEL
}  // namespace avx512_bf16
FASTRES_TARGET_END

#define FASTRES_PICK_ISA(name)                   \
  (isa() == Isa::avx512_bf16 ? avx512_bf16::name \
   : isa() == Isa::avx512    ? avx512::name      \
   : isa() == Isa::avx2      ? avx2::name        \
                             : base::name)
#elif FASTRES_X86
#define FASTRES_PICK_ISA(name) (isa() == Isa::avx2 ? avx2::name : base::name)
#else
#define FASTRES_PICK_ISA(name) (base::name)
#endif
}  // namespace fastres
