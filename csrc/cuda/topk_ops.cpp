// fusedkl::_topk_logprobs and its gradient on CUDA tensors. Schemas are defined in fusedkl/topk_ops.py.
#include "call.h"

#include <tuple>

namespace fusedkl {
namespace gpu {
namespace {

// The arguments that both share, checked, as plain data.
struct TopkCall {
  TopkArgs a{};
  bool vectors;

  TopkCall(const Tensor& policy, const Tensor& token_ids, const OptionalTensor& inverse, const OptionalTensor& mask) {
    const Call c(policy, std::nullopt, token_ids, {}, std::nullopt, inverse, mask, std::nullopt, std::nullopt);
    STD_TORCH_CHECK(token_ids.dim() == 2 && token_ids.size(0) == c.in.rows, "token_ids: one line per row");
    a.in = c.in;
    a.ids = c.ids;
    a.per_row = c.ids_per_row;
    vectors = aligned(c.in.x);
  }
};

std::tuple<Tensor, Tensor> topk_logprobs(const Tensor& policy, const Tensor& token_ids, const OptionalTensor& inverse,
                                         const OptionalTensor& mask) {
  const OnDevice device(policy);
  TopkCall c(policy, token_ids, inverse, mask);
  const int64_t rows = c.a.in.rows;
  const Tensor values = torch::stable::new_empty(policy, {rows, c.a.per_row + 1}, ScalarType::Double),
               state = torch::stable::new_empty(policy, {rows, kTopkColumns}, ScalarType::Double),
               parts = torch::stable::new_empty(policy, {rows, c.a.in.cut.count * int64_t{kStateColumns}}, ScalarType::Double);
  c.a.values = static_cast<double*>(values.mutable_data_ptr());
  c.a.state = static_cast<TopkState*>(state.mutable_data_ptr());
  c.a.parts = static_cast<RowState*>(parts.mutable_data_ptr());
  device.check(launch_topk(c.a, c.vectors, device.stream));
  return {values, state};
}

Tensor topk_logprobs_backward(const Tensor& grad, const Tensor& policy, const Tensor& token_ids, const Tensor& state,
                              const OptionalTensor& inverse) {
  const OnDevice device(policy);
  TopkCall c(policy, token_ids, inverse, std::nullopt);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Double && grad.is_contiguous() && grad.dim() == 2 &&
                      grad.size(0) == c.a.in.rows && grad.size(1) == c.a.per_row + 1,
                  "grad: contiguous float64, one more column than token_ids");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Double && state.is_contiguous() && state.dim() == 2 &&
                      state.size(0) == c.a.in.rows && state.size(1) == kTopkColumns,
                  "state does not fit the policy");
  const Tensor gx = torch::stable::new_empty(policy, sizes_of(policy));
  c.a.gx = layout_of(Rows(gx, "gradient", gx.mutable_data_ptr()), "gradient");
  c.a.grad = static_cast<const double*>(grad.const_data_ptr());
  c.a.state = static_cast<TopkState*>(state.mutable_data_ptr());
  c.vectors = c.vectors && aligned(c.a.gx);
  device.check(launch_topk_gradient(c.a, c.vectors, device.stream));
  return gx;
}

}  // namespace
}  // namespace gpu
}  // namespace fusedkl

#if defined(FUSEDKL_ON_CPU)
STABLE_TORCH_LIBRARY_IMPL(fusedkl_cuda_on_cpu, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fusedkl, CUDA, m) {
#endif
  m.impl("_topk_logprobs", TORCH_BOX(&fusedkl::gpu::topk_logprobs));
  m.impl("_topk_logprobs_backward", TORCH_BOX(&fusedkl::gpu::topk_logprobs_backward));
}
