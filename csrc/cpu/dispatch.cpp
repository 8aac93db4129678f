// Which instruction set runs: the best that the machine has, or what FUSEDKL_CPU_ISA names. Read once.
#include <stdlib.h>
#include <string.h>

#include "job.h"

namespace fusedkl {

static const KernelTable* choose() {
  const char* wanted = getenv("FUSEDKL_CPU_ISA");
  const KernelTable* const tables[] = {avx512_bf16_kernels(), avx512_kernels(), avx2_kernels(), &kPortableKernels};
  if (!wanted || !*wanted) {
    for (const KernelTable* t : tables)
      if (t) return t;
  }
  for (const KernelTable* t : tables)
    if (t && strcmp(t->isa, wanted) == 0) return t;
  return nullptr;
}

const KernelTable* kernels_or_null() {
  static const KernelTable* const table = choose();
  return table;
}

}  // namespace fusedkl
