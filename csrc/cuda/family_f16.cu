// The second sweep of rows that are both f16.
#include "family_rows.cuh"

namespace fusedkl {
namespace gpu {

template <>
bool launch_family_sums<DType::f16>(const FamilyArgs& args, Stream stream) {
  return run_family_sums<VectorRows<DType::f16, false>>(args, stream);
}
template <>
bool launch_family_gradient<DType::f16>(const GradientArgs& args, Stream stream) {
  return run_family_gradient<VectorRows<DType::f16, false>>(args, stream);
}

}  // namespace gpu
}  // namespace fusedkl
