#include "gram.h"
#include "storage.h"

#define FASTRES_KERNELS "gram.inl"
#include "foreach_isa.h"

namespace fastres {

const GramKernels& gram_kernels() { return FASTRES_PICK_ISA(gram_table); }

}  // namespace fastres
