#include "bn_act.h"
#include "storage.h"

#define FASTRES_KERNELS "bn_act.inl"
#include "foreach_isa.h"

namespace fastres {

const BnActKernels& bn_act_kernels(int dtype, bool channels_last) {
  return FASTRES_PICK_ISA(bn_act_table)[dtype][channels_last];
}

}  // namespace fastres
