// The second sweep of rows that are both bf16.
#include "family_cluster.cuh"

namespace fusedkl {
namespace gpu {

template <>
bool launch_family_sums<DType::bf16>(const FamilyArgs& args, Stream stream) {
  return run_family_sums<VectorRows<DType::bf16, false>>(args, stream);
}
template <>
bool launch_family_gradient<DType::bf16>(const GradientArgs& args, Stream stream) {
  return run_family_gradient<VectorRows<DType::bf16, false>>(args, stream);
}
template bool launch_family_cluster<DType::bf16>(const ClusterArgs&, Stream);

}  // namespace gpu
}  // namespace fusedkl
