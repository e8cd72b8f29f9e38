#include "bn_act.h"
#include "storage.h"

#define FASTRES_KERNELS "bn_act_maxpool.inl"
#include "foreach_isa.h"

namespace fastres {

const BnActPoolKernels& bn_act_pool_kernels(int dtype, bool channels_last) {
  return FASTRES_PICK_ISA(bn_act_pool_table)[dtype][channels_last];
}

}  // namespace fastres
