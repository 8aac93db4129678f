// Kernels of rows that are both f16.
#include "forward.cuh"
#include "gradient.cuh"

namespace fusedkl {
namespace gpu {
template bool launch_forward<DType::f16, DType::f16>(const ForwardArgs&, int, bool, Stream);
template bool launch_gradient<DType::f16, DType::f16>(const GradientArgs&, bool, bool, Stream);
}  // namespace gpu
}  // namespace fusedkl
