// Kernels of rows that are both bf16.
#include "forward.cuh"
#include "gradient.cuh"

namespace fusedkl {
namespace gpu {
template bool launch_forward<DType::bf16, DType::bf16>(const ForwardArgs&, int, bool, Stream);
template bool launch_gradient<DType::bf16, DType::bf16>(const GradientArgs&, bool, bool, Stream);
}  // namespace gpu
}  // namespace fusedkl
