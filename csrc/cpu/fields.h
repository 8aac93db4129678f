// The names of a row's statistics, as they stand in Python and in the operator schema.
#pragma once
#include "tensors.h"

namespace fusedkl {

// Which statistics a call wants, and the row of `values` (and of its gradient) where each stands; -1: not wanted.
struct Fields {
  int64_t forward_kl = -1, reverse_kl = -1, entropy = -1, logsumexp = -1, logprob = -1, mean_logprob = -1;
  int64_t ref_entropy = -1, ref_logsumexp = -1, ref_logprob = -1, log_ratio = -1;
  int64_t family = -1;  // one divergence of family_math.h, at most
  FamilyKind kind;
  int64_t rows = 0;

  Fields(const std::vector<std::string>& names, int64_t tokens_per_row, std::optional<double> parameter) {
    struct Slot {
      const char* name;
      int64_t Fields::* row;
      bool per_token;
    };
    static constexpr Slot kSlots[] = {
        {"forward_kl", &Fields::forward_kl, false},   {"reverse_kl", &Fields::reverse_kl, false},
        {"entropy", &Fields::entropy, false},         {"logsumexp", &Fields::logsumexp, false},
        {"logprob", &Fields::logprob, true},          {"mean_logprob", &Fields::mean_logprob, false},
        {"ref_entropy", &Fields::ref_entropy, false}, {"ref_logsumexp", &Fields::ref_logsumexp, false},
        {"ref_logprob", &Fields::ref_logprob, true},  {"log_ratio", &Fields::log_ratio, true},
    };
    for (const std::string& name : names) {
      const Slot* found = nullptr;
      for (const Slot& slot : kSlots)
        if (name == slot.name) found = &slot;
      if (!found && family_of(name, parameter.value_or(0))) {
        STD_TORCH_CHECK(family < 0, "one divergence of a second sweep at a time");
        family = rows++;
        continue;
      }
      STD_TORCH_CHECK(found, "unknown field ", name);
      STD_TORCH_CHECK(this->*found->row < 0, "field ", name, " is named twice");
      this->*found->row = rows;
      rows += found->per_token ? tokens_per_row : 1;
    }
    STD_TORCH_CHECK(family < 0 || (forward_kl < 0 && reverse_kl < 0 && entropy < 0 && log_ratio < 0 && !reference()),
                    "a divergence of a second sweep goes with logsumexp, logprob and mean_logprob only");
  }

  // about the difference of the two rows
  bool divergence() const { return forward_kl >= 0 || reverse_kl >= 0 || log_ratio >= 0 || family >= 0; }
  // one row alone: its own maximum, which a divergence does not look for
  bool policy() const { return entropy >= 0 || logsumexp >= 0 || logprob >= 0 || mean_logprob >= 0; }
  bool reference() const { return ref_entropy >= 0 || ref_logsumexp >= 0 || ref_logprob >= 0; }
  bool tokens() const { return logprob >= 0 || ref_logprob >= 0 || log_ratio >= 0; }

 private:
  bool family_of(const std::string& name, double parameter) {
    if (name == "jsd") kind = FamilyKind::jsd(parameter);
    else if (name == "skew_kl") kind = FamilyKind::skew_kl(parameter);
    else if (name == "renyi") kind = FamilyKind::renyi(parameter);
    else if (name == "tvd") kind = FamilyKind::tvd();
    else if (name == "hellinger") kind = FamilyKind::squared_hellinger();
    else return false;
    return true;
  }
};

}  // namespace fusedkl
