// Kernels for whatever the compiler's default target is.
#include "job.h"
#include "simd_portable.h"
#include "kernels.h"

namespace fusedkl {
const KernelTable kPortableKernels = FUSEDKL_KERNEL_TABLE("portable");
}
