// Kernels of rows that are both bf16.
#include "cluster.cuh"

namespace fusedkl {
namespace gpu {
template bool launch_forward<DType::bf16, DType::bf16>(const ForwardArgs&, int, bool, Stream);
template bool launch_gradient<DType::bf16, DType::bf16>(const GradientArgs&, bool, bool, Stream);
template bool launch_cluster<DType::bf16>(const ClusterArgs&, bool, Stream);
}  // namespace gpu
}  // namespace fusedkl
