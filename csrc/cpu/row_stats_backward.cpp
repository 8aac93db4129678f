// fusedkl::_row_stats_backward and its in-place form on the CPU.
#include <memory>

#include "fields.h"

namespace fusedkl {
namespace {

constexpr int64_t kChunk = 2048;  // of a mixed-dtype row, widened to fp32 in the first-level cache

struct Call {
  Rows policy;
  std::optional<Rows> reference;
  std::optional<Rows> policy_grad, reference_grad;
  Fields fields;
  const Tensor& grad;
  const RowState* states;
  const int64_t* ids;
  int64_t ids_per_row;
  const double* inv_temperature;
  bool per_row_temperature;

  double grad_at(int64_t field, int64_t r) const {
    if (field < 0) return 0;
    const int64_t i = field * grad.stride(0) + r * grad.stride(1);
    return grad.scalar_type() == ScalarType::Double ? static_cast<const double*>(grad.const_data_ptr())[i]
                                                    : static_cast<const float*>(grad.const_data_ptr())[i];
  }
};

struct Chunk {
  alignas(64) float x[kChunk], y[kChunk], gx[kChunk], gy[kChunk];
};

// Different dtypes: through fp32 chunks, each rounded once into its own dtype.
void mixed_gradient(GradientJob job, DType dx, DType dy, Chunk& room) {
  const KernelTable& k = kernels();
  const GradientJob whole = job;
  for (int64_t i = 0; i < whole.n; i += kChunk) {
    job.n = whole.n - i < kChunk ? whole.n - i : kChunk;
    k.widen[static_cast<int>(dx)](at(whole.x, dx, i), room.x, job.n);
    k.widen[static_cast<int>(dy)](at(whole.y, dy, i), room.y, job.n);
    job.x = room.x;
    job.y = room.y;
    job.gx = whole.gx ? room.gx : nullptr;
    job.gy = whole.gy ? room.gy : nullptr;
    k.gradient[0](job);
    if (whole.gx) k.narrow[static_cast<int>(dx)](room.gx, at(whole.gx, dx, i), job.n);
    if (whole.gy) k.narrow[static_cast<int>(dy)](room.gy, at(whole.gy, dy, i), job.n);
  }
}

void gradient_of_row(const Call& c, int64_t r, Chunk& room) {
  const DType dx = c.policy.dtype, dy = c.reference ? c.reference->dtype : dx;
  const RowState& s = c.states[r];
  GradientJob job;
  job.n = c.policy.length;
  job.inv_t = !c.inv_temperature ? 1 : c.inv_temperature[c.per_row_temperature ? r : 0];
  job.state = s;
  job.x = c.policy.row(r);
  double logprobs = 0;
  bool any_token = false;
  for (int64_t k = 0; k < c.ids_per_row; k++) {
    const double g = c.grad_at(c.fields.logprob + k, r);
    logprobs += g;
    any_token |= g != 0;
  }
  job.gradient = row_gradient(s, job.inv_t, c.grad_at(c.fields.forward_kl, r), c.grad_at(c.fields.reverse_kl, r), c.grad_at(c.fields.entropy, r),
                              c.grad_at(c.fields.logsumexp, r), logprobs);
  if (c.fields.divergence()) job.y = c.reference->row(r);
  if (c.policy_grad) job.gx = c.policy_grad->row(r);
  if (c.reference_grad) job.gy = c.reference_grad->row(r);
  // rows without an incoming gradient are exactly 0 and not read: they may hold anything
  if (job.gx && job.gradient.policy_zero() && !any_token) {
    memset(job.gx, 0, static_cast<size_t>(job.n * size_of(dx)));
    job.gx = nullptr;
  }
  if (job.gy && job.gradient.reference_zero()) {
    // an infinite or NaN row reaches here only by its coefficients; NaN gradients compare unequal to 0
    memset(job.gy, 0, static_cast<size_t>(job.n * size_of(dy)));
    job.gy = nullptr;
  }
  if (!job.gx && !job.gy) return;

  if (s.policy_log_sum != s.policy_log_sum) {  // no distribution: no token of it may look like one that was merely masked
    for (int64_t i = 0; i < job.n; i++) {
      if (job.gx) store_double(job.gx, dx, i, NAN);
      if (job.gy) store_double(job.gy, dy, i, NAN);
    }
    return;
  }

  // tokens whose log-probability was asked for: their values now, because the sweep may overwrite the logits
  std::vector<std::pair<int64_t, double>> tokens;
  if (any_token && job.gx) {
    for (int64_t k = 0; k < c.ids_per_row; k++) {
      const int64_t id = c.ids[r * c.ids_per_row + k];
      double direct = 0;
      for (int64_t j = 0; j < c.ids_per_row; j++)
        if (c.ids[r * c.ids_per_row + j] == id) direct += c.grad_at(c.fields.logprob + j, r);
      const double x = load_double(job.x, dx, id), y = job.y ? load_double(job.y, dy, id) : 0;
      tokens.emplace_back(id, policy_gradient_at(s, job.gradient, x, y, job.inv_t, job.y != nullptr) + direct * job.inv_t);
    }
  }
  const double largest = fmax(fabs(s.policy_max), fabs(s.reference_max)) * kLog2e;
  if (dx == DType::f64 || dy == DType::f64 || largest > 1e38) gradient_f64(job, dx, dy);
  else if (dx == dy || !job.y) kernels().gradient[static_cast<int>(dx)](job);
  else mixed_gradient(job, dx, dy, room);
  for (const auto& [id, value] : tokens) store_double(job.gx, dx, id, value);
}

void run(const Tensor& grad, const Tensor& policy, const std::optional<Tensor>& reference, const std::optional<Tensor>& token_ids, const Tensor& state,
         const std::vector<std::string>& fields, const std::optional<Tensor>& inv_temperature, const Tensor* policy_grad, const Tensor* reference_grad) {
  const int64_t per_row = token_ids ? token_ids->size(token_ids->dim() - 1) : 0;
  const Fields f(fields, per_row);
  auto out = [](const Tensor* t, const char* name) { return t ? std::optional<Rows>(Rows(*t, name, t->mutable_data_ptr())) : std::nullopt; };
  Call c{Rows::of(policy, "policy"),
         reference ? std::optional<Rows>(Rows::of(*reference, "reference")) : std::nullopt,
         out(policy_grad, "policy gradient"),
         out(reference_grad, "reference gradient"),
         f,
         grad,
         static_cast<const RowState*>(state.const_data_ptr()),
         token_ids ? static_cast<const int64_t*>(token_ids->const_data_ptr()) : nullptr,
         f.logprob >= 0 ? per_row : 0,
         inv_temperature ? static_cast<const double*>(inv_temperature->const_data_ptr()) : nullptr,
         inv_temperature && inv_temperature->numel() != 1};
  STD_TORCH_CHECK(state.is_contiguous() && state.size(0) == c.policy.count && state.size(1) == kStateColumns, "state does not fit the policy");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == f.rows && grad.size(1) == c.policy.count, "grad does not fit the fields");
  STD_TORCH_CHECK(!f.divergence() || reference, "a divergence needs a reference");
  kernels();
  torch::stable::parallel_for(0, c.policy.count, grain_of(c.policy.length), [&](int64_t begin, int64_t end) {
    const auto room = std::make_unique<Chunk>();
    for (int64_t r = begin; r < end; r++) gradient_of_row(c, r, *room);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> row_stats_backward(const Tensor& grad, const Tensor& policy, const std::optional<Tensor>& reference,
                                              const std::optional<Tensor>& token_ids, const Tensor& state, const std::vector<std::string>& fields,
                                              const std::optional<Tensor>& inv_temperature, bool policy_grad, bool reference_grad) {
  auto result = [](bool wanted, const Tensor& like, const char* name) {
    return wanted ? new_result(like, sizes_of(like), dtype_of(like, name)) : torch::stable::new_empty(like, {0});
  };
  STD_TORCH_CHECK(!reference_grad || reference, "there is no reference to have a gradient");
  const Tensor gx = result(policy_grad, policy, "policy"), gy = result(reference_grad, reference ? *reference : policy, "reference");
  run(grad, policy, reference, token_ids, state, fields, inv_temperature, policy_grad ? &gx : nullptr, reference_grad ? &gy : nullptr);
  return {gx, gy};
}

// The gradient replaces the policy's logits.
Tensor row_stats_backward_(const Tensor& grad, Tensor policy, const std::optional<Tensor>& reference, const std::optional<Tensor>& token_ids,
                           const Tensor& state, const std::vector<std::string>& fields, const std::optional<Tensor>& inv_temperature,
                           bool reference_grad) {
  STD_TORCH_CHECK(!reference_grad || reference, "there is no reference to have a gradient");
  const Tensor gy = reference_grad ? new_result(*reference, sizes_of(*reference), dtype_of(*reference, "reference"))
                                   : torch::stable::new_empty(policy, {0});
  run(grad, policy, reference, token_ids, state, fields, inv_temperature, &policy, reference_grad ? &gy : nullptr);
  return gy;
}

}  // namespace fusedkl
