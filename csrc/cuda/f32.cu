// Kernels of rows that are both f32.
#include "forward.cuh"
#include "gradient.cuh"

namespace fusedkl {
namespace gpu {
template bool launch_forward<DType::f32, DType::f32>(const ForwardArgs&, int, bool, Stream);
template bool launch_gradient<DType::f32, DType::f32>(const GradientArgs&, bool, bool, Stream);
}  // namespace gpu
}  // namespace fusedkl
