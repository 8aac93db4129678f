// fusedkl::_topk_logprobs and its gradient on the CPU: log-probabilities of K given tokens of each row, and of all others
// together, from one read of the row.
#include <algorithm>

#include "../topk_math.h"
#include "tensors.h"

namespace fusedkl {
namespace {

struct TopkCall {
  Rows policy;
  const int64_t* ids;
  int64_t per_row;
  const double* inv_temperature = nullptr;
  bool per_row_temperature = false;

  TopkCall(const Tensor& policy_, const Tensor& token_ids, const std::optional<Tensor>& inverse)
      : policy(Rows::of(policy_, "policy")),
        ids(static_cast<const int64_t*>(token_ids.const_data_ptr())),
        per_row(token_ids.size(token_ids.dim() - 1)) {
    STD_TORCH_CHECK(policy.length > 0, "the vocabulary is empty");
    STD_TORCH_CHECK(token_ids.dim() == 2 && token_ids.size(0) == policy.count && token_ids.is_contiguous() &&
                        token_ids.scalar_type() == ScalarType::Long,
                    "token_ids: contiguous int64, the same number for each row");
    for (int64_t i = 0; i < policy.count * per_row; i++)
      STD_TORCH_CHECK(ids[i] < policy.length, "token id ", ids[i], " is outside of the vocabulary of ", policy.length);
    if (!inverse) return;
    STD_TORCH_CHECK(inverse->scalar_type() == ScalarType::Double && inverse->is_contiguous() &&
                        (inverse->numel() == 1 || inverse->numel() == policy.count),
                    "inv_temperature: contiguous float64, one, or one per row");
    inv_temperature = static_cast<const double*>(inverse->const_data_ptr());
    per_row_temperature = inverse->numel() != 1;
  }

  double inv_t(int64_t r) const { return !inv_temperature ? 1 : inv_temperature[per_row_temperature ? r : 0]; }
  double logit(int64_t r, int64_t id) const { return load_double(policy.row(r), policy.dtype, id); }
  bool exact(double inv_t) const { return policy.dtype == DType::f64 || extreme_temperature(inv_t); }
};

// Room of one task. The given tokens are taken out of a copy of each segment, which stays in the second-level cache.
struct TopkRoom {
  std::vector<int64_t> sorted;
  std::vector<RowState> parts;
  std::vector<unsigned char> segment;
};

RowState mass(double max, double log_sum) {
  RowState part{};
  part.policy_max = log_sum > -INFINITY ? max : 0;
  part.policy_log_sum = log_sum;
  return part;
}

RowState total(const std::vector<RowState>& parts) {
  for (const RowState& part : parts)
    if (part.policy_log_sum != part.policy_log_sum) return nan_state();
  int top;
  const double more = merged_log_sum(parts.data(), static_cast<int>(parts.size()), true, &top);
  return mass(parts[static_cast<size_t>(top)].policy_max, parts[static_cast<size_t>(top)].policy_log_sum + more);
}

TopkState topk_state(const TopkCall& c, int64_t r, TopkRoom& room) {
  const double inv_t = c.inv_t(r);
  const DType d = c.policy.dtype;
  const bool exact = c.exact(inv_t);
  const int64_t n = c.policy.length, size = exact ? n : Segments(n).size;
  room.sorted.assign(c.ids + r * c.per_row, c.ids + (r + 1) * c.per_row);
  std::sort(room.sorted.begin(), room.sorted.end());
  auto next = std::lower_bound(room.sorted.begin(), room.sorted.end(), 0);  // padding is negative
  room.parts.clear();
  for (int64_t begin = 0; begin < n; begin += size) {
    const int64_t length = n - begin < size ? n - begin : size;
    const void* from = c.policy.row(r, begin);
    if (next != room.sorted.end() && *next < begin + length) {
      room.segment.resize(static_cast<size_t>(size * size_of(d)));
      memcpy(room.segment.data(), from, static_cast<size_t>(length * size_of(d)));
      for (; next != room.sorted.end() && *next < begin + length; ++next)
        store_double(room.segment.data(), d, *next - begin, -INFINITY);
      from = room.segment.data();
    }
    room.parts.push_back(exact ? single_f64({from, d}, length, inv_t)
                               : kernels().single[static_cast<int>(d)](from, length, inv_t, false));
  }
  const RowState rest = total(room.parts);
  room.parts.assign(1, rest);
  for (int64_t k = 0; k < c.per_row; k++) {
    const int64_t id = c.ids[r * c.per_row + k];
    if (id < 0) continue;
    const double x = c.logit(r, id) * inv_t;
    room.parts.push_back(mass(x, x == -INFINITY ? -INFINITY : x == INFINITY ? NAN : x - x));  // NaN stays NaN
  }
  const RowState row = total(room.parts);
  return {row.policy_max, row.policy_log_sum, rest.policy_max, rest.policy_log_sum};
}

std::tuple<Tensor, Tensor> topk_logprobs(const Tensor& policy, const Tensor& token_ids,
                                         const std::optional<Tensor>& inv_temperature, const std::optional<Tensor>& mask) {
  const TopkCall c(policy, token_ids, inv_temperature);
  const int64_t rows = c.policy.count, columns = c.per_row + 1;
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == rows),
                  "mask: contiguous bool, one per row");
  const bool* const counted = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  kernels();  // an unusable instruction set must throw here, not inside a parallel region
  const Tensor values = torch::stable::new_empty(policy, {rows, columns}, ScalarType::Double);
  const Tensor state = torch::stable::new_empty(policy, {rows, kTopkColumns}, ScalarType::Double);
  torch::stable::parallel_for(0, rows, grain_of(c.policy.length), [&](int64_t begin, int64_t end) {
    TopkRoom room;
    for (int64_t r = begin; r < end; r++) {
      double* const out = static_cast<double*>(values.mutable_data_ptr()) + r * columns;
      const bool read = !counted || counted[r];
      const TopkState s = read ? topk_state(c, r, room) : TopkState{};
      static_cast<TopkState*>(state.mutable_data_ptr())[r] = s;
      for (int64_t k = 0; k < c.per_row; k++) {
        const int64_t id = c.ids[r * c.per_row + k];
        out[k] = read && id >= 0 ? s.logprob(c.logit(r, id) * c.inv_t(r)) : 0;
      }
      out[c.per_row] = read ? s.rest_logprob() : 0;
    }
  });
  return {values, state};
}

void topk_gradient(const TopkCall& c, int64_t r, const TopkState& s, const double* grad, void* to) {
  const int64_t n = c.policy.length;
  const DType d = c.policy.dtype;
  const double inv_t = c.inv_t(r), b = grad[c.per_row];
  double tokens = 0;
  bool any = b != 0;
  for (int64_t k = 0; k < c.per_row; k++)
    tokens += grad[k], any |= grad[k] != 0;  // of tokens in other slices of the vocabulary too
  if (!any) {                                // exactly 0, and not read: the row may hold anything
    memset(to, 0, static_cast<size_t>(n * size_of(d)));
    return;
  }
  if (!(s.policy_log_sum > -INFINITY)) {  // no mass anywhere is no distribution; a slice may be empty
    for (int64_t i = 0; i < n; i++) store_double(to, d, i, NAN);
    return;
  }
  const TopkGradient g(s, inv_t, tokens, b);
  GradientJob job;
  job.n = n;
  job.inv_t = inv_t;
  job.x = c.policy.row(r);
  job.gx = to;
  job.state = mass(s.rest_max, s.rest_log_sum);
  job.gradient.mass = g.rest;
  if (g.rest == 0) memset(to, 0, static_cast<size_t>(n * size_of(d)));
  else if (c.exact(inv_t) || !(fabs(s.rest_max) <= 1e37)) gradient_f64(job, d, d);
  else kernels().gradient[static_cast<int>(d)](job);
  for (int64_t k = 0; k < c.per_row; k++) {
    const int64_t id = c.ids[r * c.per_row + k];
    if (id >= 0) store_double(to, d, id, g.given(grad[k], s.logprob(c.logit(r, id) * inv_t)));
  }
}

Tensor topk_logprobs_backward(const Tensor& grad, const Tensor& policy, const Tensor& token_ids, const Tensor& state,
                              const std::optional<Tensor>& inv_temperature) {
  const TopkCall c(policy, token_ids, inv_temperature);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Double && grad.is_contiguous() && grad.dim() == 2 &&
                      grad.size(0) == c.policy.count && grad.size(1) == c.per_row + 1,
                  "grad: contiguous float64, one more column than token_ids");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Double && state.is_contiguous() && state.dim() == 2 &&
                      state.size(0) == c.policy.count && state.size(1) == kTopkColumns,
                  "state does not fit the policy");
  kernels();
  const Tensor result = new_gradient(policy, c.policy.dtype);
  const Rows out(result, "gradient", result.mutable_data_ptr());
  torch::stable::parallel_for(0, c.policy.count, grain_of(c.policy.length), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      topk_gradient(c, r, static_cast<const TopkState*>(state.const_data_ptr())[r],
                    static_cast<const double*>(grad.const_data_ptr()) + r * (c.per_row + 1), out.row(r));
  });
  return result;
}

}  // namespace
}  // namespace fusedkl

STABLE_TORCH_LIBRARY_IMPL(fusedkl, CPU, m) {
  m.impl("_topk_logprobs", TORCH_BOX(&fusedkl::topk_logprobs));
  m.impl("_topk_logprobs_backward", TORCH_BOX(&fusedkl::topk_logprobs_backward));
}
