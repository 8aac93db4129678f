// The second sweep of rows of two dtypes, or at any alignment.
#include "family_rows.cuh"

namespace fusedkl {
namespace gpu {

bool launch_any_family_sums(const FamilyArgs& args, Stream stream) { return run_family_sums<AnyRows>(args, stream); }
bool launch_any_family_gradient(const GradientArgs& args, Stream stream) { return run_family_gradient<AnyRows>(args, stream); }

}  // namespace gpu
}  // namespace fusedkl
