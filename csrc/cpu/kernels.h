// The body of every isa_*.cpp, after its simd_*.h: one source, compiled once per instruction set.
// clang-format off
#include "block_kernels.h"
#include "segment.h"
#include "gradient.h"
#include "elementwise.h"
#include "family_kernels.h"
#include "softcap.h"
// clang-format on

#define FUSEDKL_KERNEL_TABLE(name)                                                                    \
  {name,                                                                                              \
   {divergence_segment<DType::f32>, divergence_segment<DType::bf16>, divergence_segment<DType::f16>}, \
   {single_segment<DType::f32>, single_segment<DType::bf16>, single_segment<DType::f16>},             \
   sharpen_mass,                                                                                      \
   {logit_sum_row<DType::f32>, logit_sum_row<DType::bf16>, logit_sum_row<DType::f16>},                \
   {gradient_row<DType::f32>, gradient_row<DType::bf16>, gradient_row<DType::f16>},                   \
   {needs_whole_row<DType::f32>, needs_whole_row<DType::bf16>, needs_whole_row<DType::f16>},          \
   {sharpen_state<DType::f32>, sharpen_state<DType::bf16>, sharpen_state<DType::f16>},                \
   {family_sums<DType::f32>, family_sums<DType::bf16>, family_sums<DType::f16>},                      \
   {family_gradient<DType::f32>, family_gradient<DType::bf16>, family_gradient<DType::f16>},          \
   {widen_block<DType::f32>, widen_block<DType::bf16>, widen_block<DType::f16>},                      \
   {narrow_block<DType::f32>, narrow_block<DType::bf16>, narrow_block<DType::f16>},                   \
   log_softmax_block,                                                                                 \
   sum_block,                                                                                         \
   log_softmax_gradient_block,                                                                        \
   kSoftcapKernels}
