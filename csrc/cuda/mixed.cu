// Kernels of rows of two dtypes.
#include "forward.cuh"
#include "gradient.cuh"

namespace fusedkl {
namespace gpu {

#define FUSEDKL_PAIR(X, Y)                                                                      \
  template bool launch_forward<DType::X, DType::Y>(const ForwardArgs&, int, bool, Stream);      \
  template bool launch_gradient<DType::X, DType::Y>(const GradientArgs&, bool, bool, Stream);
FUSEDKL_PAIR(bf16, f16)
FUSEDKL_PAIR(bf16, f32)
FUSEDKL_PAIR(f16, bf16)
FUSEDKL_PAIR(f16, f32)
FUSEDKL_PAIR(f32, bf16)
FUSEDKL_PAIR(f32, f16)
#undef FUSEDKL_PAIR

}  // namespace gpu
}  // namespace fusedkl
