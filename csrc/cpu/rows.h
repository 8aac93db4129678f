// The two halves of row_stats on the CPU, row by row: what the operators of row_stats.cpp and row_stats_backward.cpp share.
#pragma once
#include <memory>
#include <utility>

#include "fields.h"

namespace fusedkl {

// What a call says of all its rows in plain numbers.
struct Controls {
  std::optional<double> parameter;     // beta or alpha of the divergence that has one
  std::optional<int64_t> valid_vocab;  // only the first so many logits of a row exist
  std::optional<double> softcap;       // logits are c tanh(x/c)
};

// Arguments of a forward call, checked, as pointers.
struct ForwardCall {
  Rows policy;
  std::optional<Rows> reference;
  Fields fields;
  const double* inv_temperature = nullptr;  // one per row, or one for all
  bool per_row_temperature = false;
  const bool* mask = nullptr;
  const int64_t* ids = nullptr;
  int64_t ids_per_row = 0;
  bool f64 = false;
  double cap = 0;
  Tensor values, state;

  ForwardCall(const Tensor& policy, const std::optional<Tensor>& reference, const std::optional<Tensor>& token_ids,
              const std::vector<std::string>& names, const std::optional<Tensor>& inv_temperature,
              const std::optional<Tensor>& mask, const Controls& controls);

  double inv_t(int64_t r) const { return !inv_temperature ? 1 : inv_temperature[per_row_temperature ? r : 0]; }
  bool in_double(double inv_t) const { return f64 || extreme_temperature(inv_t); }
  bool counted(int64_t r) const { return !mask || mask[r]; }
  // in double, a row is not cut: it is the exact path, and its rows are short
  int64_t segments() const { return f64 ? 1 : Segments(policy.length).count; }
  int64_t segment_length() const { return f64 ? policy.length : Segments(policy.length).size; }
};

// Room for one segment of both rows in fp32, where a sweep takes them so; made at most once per task.
class Widened {
 public:
  float* policy(const void* from, DType d, int64_t n) { return fill(policy_, from, d, n); }
  float* reference(const void* from, DType d, int64_t n) { return fill(reference_, from, d, n); }

 private:
  static float* fill(std::unique_ptr<float[]>& room, const void* from, DType d, int64_t n);
  std::unique_ptr<float[]> policy_, reference_;
};

RowState segment_state(const ForwardCall& c, int64_t r, int64_t segment, Widened& room);
void forward_row(const ForwardCall& c, int64_t r, std::vector<RowState>& parts, Widened& room);  // writes values and state

// put(field's row of `values`, number) for all that a state holds: everything but the numbers of tokens
template <class Put>
inline void row_values(const Fields& fields, const RowState& s, Put put) {
  auto maybe = [&](int64_t field, double v) {
    if (field >= 0) put(field, v);
  };
  maybe(fields.forward_kl, s.forward_kl);
  maybe(fields.reverse_kl, s.reverse_kl);
  maybe(fields.entropy, s.entropy);
  maybe(fields.logsumexp, s.policy_max + s.policy_log_sum);
  maybe(fields.mean_logprob, mean_logprob(s));
  maybe(fields.ref_entropy, s.reference_entropy);
  maybe(fields.ref_logsumexp, s.reference_max + s.reference_log_sum);
  maybe(fields.family, s.divergence);
}

// RowState::whole is -1 where a row was merged from slices of which the others are in other processes (shard_states.py). The three
// that follow are for those.
//
// Whether one token has more than half of the row, a slice of which is given. What a second sweep subtracts there is a rest of
// sums, which float does not hold; of a whole row another sweep measures it, of a slice nobody can.
inline bool sharp(const Logits& x, const Logits& y, int64_t n, const RowState& s, double inv_t) {
  auto from = [&](double max, double log_sum) { return (max + (log_sum - kLn2)) / inv_t; };
  const double many_x = from(s.policy_max, s.policy_log_sum), many_y = from(s.reference_max, s.reference_log_sum);
  for (int64_t i = 0; i < n; i++)
    if (x[i] > many_x || y[i] > many_y) return true;
  return false;
}

// Whether nearly all of a slice's mass is one side's: its sums are as large as that, and the other side's may be the rest of a
// row that is sharp in another slice.
inline bool one_sided(const FamilySums& sums) { return fabs(sums.excess) > 0.9 * sums.apart; }

// The means of a mixture's slopes as the slopes themselves add up, for sums over a slice. Those of family_math.h leave out multiples
// of sum (p - q), which is 0 over the row only as far as the log-ratio is exact; that error is then in both and cancels.
inline void take_means_as_summed(const FamilyKind& k, FamilySums& sums) {
  if (k.family != Family::mixture) return;
  const double left_out = (1 - k.beta) * (k.weight_p != 0 ? k.beta : 1 - k.beta) * sums.excess;
  sums.policy_slope += left_out;
  sums.reference_slope -= left_out;
}

// Whether the rows hardly overlap: every slope of a mixture is then about as large as its mean.
inline bool saturated(const FamilyKind& k, const RowState& s) {
  return k.family == Family::mixture && s.divergence > -0.8 * (k.weight_q * log(k.beta) + k.weight_p * log1p(-k.beta));
}

// The row or both rows in fp32, where a sweep takes them so.
struct MixedRow {
  std::vector<float> x, y;

  void widen(GradientJob& job, DType dx, DType dy);  // the job's rows become these
};

// Whether a sweep that knows the row's state takes its logits in fp32, whose differences are exact: rows of two dtypes, and 16-bit
// rows so far apart that a difference of theirs is rounded by more than they differ.
inline bool is_widened(DType dx, DType dy, const RowState& s, double inv_t) {
  return dx != dy || (dx != DType::f32 && difference_too_coarse(s, inv_t));
}

// Whether a difference of capped logits, which is right to a float's rounding of itself, is all the same too coarse for the row.
// Rows that do not differ, or all tokens alike, have it exactly.
inline bool capped_too_coarse(const GradientJob& job) {
  return job.y && job.state.forward_kl != 0 && difference_too_coarse(job.state, job.inv_t);
}

// The state of rows that are taken about a logit `max`.
inline RowState about_maximum(RowState s, double max, double inv_t) {
  s.policy_max -= max * inv_t;
  s.reference_max -= max * inv_t;
  return s;
}

// Arguments of a backward call.
struct BackwardCall {
  Rows policy;
  std::optional<Rows> reference, policy_grad, reference_grad;
  Fields fields;
  const Tensor& grad;
  const RowState* states;
  const int64_t* ids;
  int64_t ids_per_row;
  const double* inv_temperature;
  bool per_row_temperature;
  double cap;

  BackwardCall(const Tensor& grad, const Tensor& policy, const std::optional<Tensor>& reference,
               const std::optional<Tensor>& token_ids, const Tensor& state, const std::vector<std::string>& names,
               const std::optional<Tensor>& inv_temperature, const Controls& controls, const Tensor* policy_grad,
               const Tensor* reference_grad);

  double grad_at(int64_t field, int64_t r) const;
  bool live(int64_t r) const;                                    // whether any gradient arrives at the row
  double token_grad(int64_t field, int64_t k, int64_t r) const;  // of a row's k-th token
};

// The rows of a pair, cut to the logits that exist.
void cut_rows(Rows& policy, std::optional<Rows>& reference, const Controls& controls);

// A token whose log-probability was asked for: where its gradient goes, and what it is.
struct TokenGradient {
  void* row;
  DType dtype;
  int64_t id;
  double value;
};

// Sweeps of a row that need nothing but its state, so that threads may share them, and what is stored after them.
struct LaterSweeps {
  std::vector<std::pair<GradientJob, DType>> jobs;
  std::vector<TokenGradient> tokens;
};

void gradient_of_row(const BackwardCall& c, int64_t r, MixedRow& room, LaterSweeps* later);  // null: all of it at once

// Whether there are too few rows for the threads, and a row is long enough to be shared.
inline bool few_long_rows(int64_t rows, int64_t segments) {
  const int64_t threads = torch::stable::get_num_threads();
  return segments > 1 && rows < 4 * threads && threads > 1;
}
void forward_by_segments(const ForwardCall& c);  // for such; the same numbers as forward_row's

}  // namespace fusedkl
