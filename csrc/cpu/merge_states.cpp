// fusedkl::_merge_states on the CPU: one state per row from the states of slices of its vocabulary.
#include "rows.h"

namespace fusedkl {

// parts [P, N, columns] in the order of the slices; inv_temperature one, or one per row. Values are float64: the state has them so.
std::tuple<Tensor, Tensor> merge_states(const Tensor& parts, const std::vector<std::string>& names,
                                        const std::optional<Tensor>& inverse) {
  STD_TORCH_CHECK(parts.dim() == 3 && parts.size(2) == kStateColumns && parts.is_contiguous() &&
                      parts.scalar_type() == ScalarType::Double && parts.size(0) > 0,
                  "parts: contiguous float64 of shape [P, N, ", kStateColumns, "], P >= 1");
  const int64_t count = parts.size(0), rows = parts.size(1);
  const Fields fields(names, 0, std::nullopt);
  STD_TORCH_CHECK(fields.logprob < 0, "log-probabilities of tokens are not numbers of a state");
  STD_TORCH_CHECK(!inverse || (inverse->scalar_type() == ScalarType::Double && inverse->is_contiguous() &&
                               (inverse->numel() == 1 || inverse->numel() == rows)),
                  "inv_temperature: contiguous float64, one, or one per row");
  const double* const inv_t = inverse ? static_cast<const double*>(inverse->const_data_ptr()) : nullptr;
  const int64_t step = inverse && inverse->numel() != 1 ? 1 : 0;
  const Tensor values = torch::stable::new_empty(parts, {fields.rows, rows}, ScalarType::Double),
               state = torch::stable::new_empty(parts, {rows, kStateColumns}, ScalarType::Double);
  const auto* const from = static_cast<const RowState*>(parts.const_data_ptr());
  auto* const to = static_cast<RowState*>(state.mutable_data_ptr());
  auto* const numbers = static_cast<double*>(values.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1 + (int64_t{1} << 12) / count, [&](int64_t begin, int64_t end) {
    std::vector<RowState> slices(static_cast<size_t>(count));
    for (int64_t r = begin; r < end; r++) {
      for (int64_t i = 0; i < count; i++) slices[static_cast<size_t>(i)] = from[i * rows + r];
      RowState merged = merge(slices.data(), static_cast<int>(count), inv_t ? inv_t[r * step] : 1);
      if (count > 1) merged.whole = 0;
      to[r] = merged;
      row_values(fields, settled(merged), [&](int64_t field, double v) { numbers[field * rows + r] = v; });
    }
  });
  return {values, state};
}

}  // namespace fusedkl
