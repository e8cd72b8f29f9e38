#include "add_act.h"
#include "storage.h"

#define FASTRES_KERNELS "add_act.inl"
#include "foreach_isa.h"

namespace fastres {

const AddActKernels& add_act_kernels(int dtype) { return FASTRES_PICK_ISA(add_act_table)[dtype]; }

}  // namespace fastres
