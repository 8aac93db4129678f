// The names of a row's statistics, as they stand in Python and in the operator schema.
#pragma once
#include "tensors.h"

namespace fusedkl {

// Which statistics a call wants, and the row of `values` (and of its gradient) where each stands; -1: not wanted.
struct Fields {
  int64_t forward_kl = -1, reverse_kl = -1, entropy = -1, logsumexp = -1, logprob = -1;
  int64_t rows = 0;

  Fields(const std::vector<std::string>& names, int64_t tokens_per_row) {
    for (const std::string& name : names) {
      int64_t* const slot = name == "forward_kl"   ? &forward_kl
                            : name == "reverse_kl" ? &reverse_kl
                            : name == "entropy"    ? &entropy
                            : name == "logsumexp"  ? &logsumexp
                            : name == "logprob"    ? &logprob
                                                   : nullptr;
      STD_TORCH_CHECK(slot, "unknown field ", name);
      STD_TORCH_CHECK(*slot < 0, "field ", name, " is named twice");
      *slot = rows;
      rows += name == "logprob" ? tokens_per_row : 1;
    }
  }

  bool divergence() const { return forward_kl >= 0 || reverse_kl >= 0; }
  // the policy alone: its own maximum, which a divergence does not look for
  bool single() const { return entropy >= 0 || logsumexp >= 0 || logprob >= 0 || !divergence(); }
};

}  // namespace fusedkl
