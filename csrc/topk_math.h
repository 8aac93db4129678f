// A row of logits as K + 1 outcomes, K tokens that are given and all others together (the rest): the C++ home of its formulas.
#pragma once
#include "row_math.h"

namespace fusedkl {

// One row of the operator's state: logsumexp of the whole row and of the rest alone, each in two parts.
struct TopkState {
  double policy_max, policy_log_sum, rest_max, rest_log_sum;

  FUSEDKL_MEMBER double logprob(double scaled_logit) const { return (scaled_logit - policy_max) - policy_log_sum; }
  // never 1 - sum of the others, which has no digits where they hold nearly all of the mass
  FUSEDKL_MEMBER double rest_logprob() const { return (rest_max - policy_max) + (rest_log_sum - policy_log_sum); }
  FUSEDKL_MEMBER bool has_rest() const { return rest_log_sum > -INFINITY; }
};
constexpr int kTopkColumns = 4;
static_assert(sizeof(TopkState) == kTopkColumns * sizeof(double));

// With the incoming gradients a_k of the tokens' log-probabilities, b of the rest's, all = sum a + b, and r the rest's own softmax:
//   d/dx_i = r_i (b - e^rest all)/T of a token of the rest,   (a_i - p_i all)/T of one that is given.
// The rest is weighed on its own scale, where none of it underflows.
struct TopkGradient {
  double inv_t, all, rest;

  FUSEDKL_MEMBER TopkGradient(const TopkState& s, double inverse_temperature, double sum_a, double b)
      : inv_t(inverse_temperature), all(sum_a + b), rest(s.has_rest() ? inv_t * (b - all * exp(s.rest_logprob())) : 0) {}
  FUSEDKL_MEMBER double given(double a, double logprob) const { return inv_t * (a - exp(logprob) * all); }
};

}  // namespace fusedkl
