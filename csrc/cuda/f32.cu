// Kernels of rows that are both f32.
#include "cluster.cuh"

namespace fusedkl {
namespace gpu {
template bool launch_forward<DType::f32, DType::f32>(const ForwardArgs&, int, bool, Stream);
template bool launch_gradient<DType::f32, DType::f32>(const GradientArgs&, bool, bool, Stream);
template bool launch_cluster<DType::f32>(const ClusterArgs&, bool, Stream);
}  // namespace gpu
}  // namespace fusedkl
