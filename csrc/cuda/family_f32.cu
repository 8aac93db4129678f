// The second sweep of rows that are both f32.
#include "family_cluster.cuh"

namespace fusedkl {
namespace gpu {

template <>
bool launch_family_sums<DType::f32>(const FamilyArgs& args, Stream stream) {
  return run_family_sums<VectorRows<DType::f32, false>>(args, stream);
}
template <>
bool launch_family_gradient<DType::f32>(const GradientArgs& args, Stream stream) {
  return run_family_gradient<VectorRows<DType::f32, false>>(args, stream);
}
template bool launch_family_cluster<DType::f32>(const ClusterArgs&, Stream);

}  // namespace gpu
}  // namespace fusedkl
