#include "conv.h"
#include "conv_backward.h"
#include "conv_grouped.h"
#include "storage.h"

#define FASTRES_KERNELS "conv_kernels.inl"
#include "foreach_isa.h"

namespace fastres {

MaxPoolRow max_pool_row_kernel(int dtype) { return FASTRES_PICK_ISA(max_pool_row_table)[dtype]; }
ToFloat to_float_kernel(int dtype) { return FASTRES_PICK_ISA(to_float_table)[dtype]; }
const GemmConvKernels& gemm_conv_kernels() { return FASTRES_PICK_ISA(gemm_table); }
const GroupedKernels& grouped_kernels() { return FASTRES_PICK_ISA(grouped_table); }
const WinogradKernels& winograd_kernels(int64_t tile) {
  return tile == 2 ? FASTRES_PICK_ISA(winograd2_table) : FASTRES_PICK_ISA(winograd4_table);
}

const StemKernels& stem_kernels() { return FASTRES_PICK_ISA(stem_table); }
const WeightGradientKernels& weight_gradient_kernels() { return FASTRES_PICK_ISA(weight_gradient_table); }
const WinogradGradientKernels& winograd_gradient_kernels() { return FASTRES_PICK_ISA(winograd_gradient_table); }

}  // namespace fastres
