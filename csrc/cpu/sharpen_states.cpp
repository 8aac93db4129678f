// fusedkl::_sharpen_states on the CPU: states of rows that will be slices of longer ones, as right as their gradients need them.
// A gradient over whole rows measures what its state lacks by one more sweep; one over a slice cannot, so it is done beforehand.
#include "rows.h"

namespace fusedkl {
namespace {

void sharpen_states(const Tensor& policy_, const Tensor& reference_, Tensor state, bool means, bool second_sweep,
                    const std::optional<Tensor>& inverse, const std::optional<Tensor>& mask, std::optional<int64_t> valid_vocab) {
  Rows policy = Rows::of(policy_, "policy");
  std::optional<Rows> reference = Rows::of(reference_, "reference");
  cut_rows(policy, reference, {std::nullopt, valid_vocab, std::nullopt});
  STD_TORCH_CHECK(state.is_contiguous() && state.scalar_type() == ScalarType::Double && state.size(0) == policy.count &&
                      state.size(1) == kStateColumns,
                  "state does not fit the policy");
  STD_TORCH_CHECK(!inverse || (inverse->scalar_type() == ScalarType::Double && inverse->is_contiguous() &&
                               (inverse->numel() == 1 || inverse->numel() == policy.count)),
                  "inv_temperature: contiguous float64, one, or one per row");
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == policy.count),
                  "mask: contiguous bool, one per row");
  const DType dx = policy.dtype, dy = reference->dtype;
  if (dx == DType::f64 || dy == DType::f64) return;
  const double* const inv_t = inverse ? static_cast<const double*>(inverse->const_data_ptr()) : nullptr;
  const int64_t step = inverse && inverse->numel() != 1 ? 1 : 0;
  const bool* const counted = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  auto* const states = static_cast<RowState*>(state.mutable_data_ptr());
  kernels();  // an unusable instruction set must throw here, not inside a parallel region
  torch::stable::parallel_for(0, policy.count, grain_of(policy.length), [&](int64_t begin, int64_t end) {
    MixedRow room;
    for (int64_t r = begin; r < end; r++) {
      GradientJob job;
      if (counted && !counted[r]) continue;
      job.inv_t = inv_t ? inv_t[r * step] : 1;
      if (beyond_float(states[r], job.inv_t)) continue;
      job.n = policy.length;
      job.state = states[r];
      job.gradient.reverse = job.gradient.ref_forward = means ? 1 : 0;
      job.x = policy.row(r);
      job.y = reference->row(r);
      const Logits x{job.x, dx}, y{job.y, dy};
      if (second_sweep && (dx == DType::f32 || dy == DType::f32) && sharp(x, y, job.n, states[r], job.inv_t)) {
        states[r] = divergence_f64(x, y, job.n, job.inv_t);
        continue;
      }
      const bool widened = is_widened(dx, dy, states[r], job.inv_t);
      if (widened) room.widen(job, dx, dy);
      kernels().sharpen[widened ? 0 : static_cast<int>(dx)](job, states[r]);
    }
  });
}

}  // namespace
}  // namespace fusedkl

STABLE_TORCH_LIBRARY_IMPL(fusedkl, CPU, m) { m.impl("_sharpen_states", TORCH_BOX(&fusedkl::sharpen_states)); }
