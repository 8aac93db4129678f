// fusedkl::_row_stats on the CPU: rows over threads, long rows by segments, one RowState per row.
#include "rows.h"

namespace fusedkl {

void cut_rows(Rows& policy, std::optional<Rows>& reference, const Controls& controls) {
  STD_TORCH_CHECK(!controls.softcap, "softcap is not supported by the cpu backend yet");
  const int64_t length = controls.valid_vocab.value_or(policy.length);
  STD_TORCH_CHECK(length <= policy.length && (!reference || (reference->count == policy.count && length <= reference->length &&
                                                             (controls.valid_vocab || length == reference->length))),
                  "policy and reference differ in shape");
  policy.length = length;
  if (reference) reference->length = length;
}

ForwardCall::ForwardCall(const Tensor& policy_, const std::optional<Tensor>& reference_, const std::optional<Tensor>& token_ids,
                         const std::vector<std::string>& names, const std::optional<Tensor>& inverse,
                         const std::optional<Tensor>& counted_, const Controls& controls)
    : policy(Rows::of(policy_, "policy")),
      reference(reference_ ? std::optional<Rows>(Rows::of(*reference_, "reference")) : std::nullopt),
      fields(names, token_ids ? token_ids->size(token_ids->dim() - 1) : 0) {
  cut_rows(policy, reference, controls);
  const int64_t rows = policy.count, length = policy.length;
  STD_TORCH_CHECK(!fields.divergence() || reference, "a divergence needs a reference");
  STD_TORCH_CHECK(length > 0, "the vocabulary is empty");
  f64 = policy.dtype == DType::f64 || (reference && reference->dtype == DType::f64);
  if (inverse) {
    STD_TORCH_CHECK(inverse->scalar_type() == ScalarType::Double && inverse->is_contiguous(),
                    "inv_temperature: contiguous float64");
    STD_TORCH_CHECK(inverse->numel() == 1 || inverse->numel() == rows, "inv_temperature: one, or one per row");
    inv_temperature = static_cast<const double*>(inverse->const_data_ptr());
    per_row_temperature = inverse->numel() != 1;
  }
  if (counted_) {
    STD_TORCH_CHECK(counted_->scalar_type() == ScalarType::Bool && counted_->is_contiguous() && counted_->numel() == rows,
                    "mask: contiguous bool, one per row");
    mask = static_cast<const bool*>(counted_->const_data_ptr());
  }
  STD_TORCH_CHECK(fields.logprob < 0 || token_ids, "logprob needs token_ids");
  if (token_ids && fields.logprob >= 0) {
    ids_per_row = token_ids->size(token_ids->dim() - 1);
    STD_TORCH_CHECK(
        token_ids->scalar_type() == ScalarType::Long && token_ids->is_contiguous() && token_ids->numel() == rows * ids_per_row,
        "token_ids: contiguous int64, the same number for each row");
    ids = static_cast<const int64_t*>(token_ids->const_data_ptr());
    for (int64_t i = 0; i < rows * ids_per_row; i++)
      STD_TORCH_CHECK(!counted(i / ids_per_row) || (ids[i] >= 0 && ids[i] < length), "token id ", ids[i],
                      " is outside of the vocabulary of ", length);
  }
  kernels();  // an unusable instruction set must throw here, not inside a parallel region
  values = torch::stable::new_empty(policy_, {fields.rows, rows}, f64 ? ScalarType::Double : ScalarType::Float);
  state = torch::stable::new_empty(policy_, {rows, kStateColumns}, ScalarType::Double);
}

const float* Widened::fill(std::unique_ptr<float[]>& room, const void* from, DType d, int64_t n) {
  if (!room) room.reset(new float[static_cast<size_t>(Segments(int64_t{1} << 40).size)]);
  kernels().widen[static_cast<int>(d)](from, room.get(), n);
  return room.get();
}

RowState segment_state(const ForwardCall& c, int64_t r, int64_t segment, Widened& room) {
  const int64_t begin = segment * c.segment_length(), left = c.policy.length - begin,
                n = left < c.segment_length() ? left : c.segment_length();
  const void* x = c.policy.row(r, begin);
  const DType dx = c.policy.dtype;
  const double inv_t = c.inv_t(r);
  RowState s{};
  if (c.fields.divergence()) {
    const void* y = c.reference->row(r, begin);
    const DType dy = c.reference->dtype;
    const bool reverse = c.fields.reverse_kl >= 0;
    if (c.f64 || extreme_temperature(inv_t)) s = divergence_f64(x, dx, y, dy, n, inv_t);
    else if (dx == dy) s = kernels().divergence[static_cast<int>(dx)](x, y, n, inv_t, reverse);
    else s = kernels().divergence[0](room.policy(x, dx, n), room.reference(y, dy, n), n, inv_t, reverse);
  }
  if (c.fields.single()) {
    const bool entropy = c.fields.entropy >= 0;
    const RowState own = c.f64 || extreme_temperature(inv_t) ? single_f64(x, dx, n, inv_t)
                                                             : kernels().single[static_cast<int>(dx)](x, n, inv_t, entropy);
    s.policy_max = own.policy_max;
    s.policy_log_sum = own.policy_log_sum;
    s.entropy = own.entropy;
  }
  return s;
}

// A row without any mass is no distribution: its values are NaN. Its state says -inf, because it may be a slice of a longer row.
bool no_mass(const Fields& fields, const RowState& s) {
  return s.policy_log_sum == -INFINITY || (fields.divergence() && s.reference_log_sum == -INFINITY);
}

template <class V>
static void write_values(const ForwardCall& c, int64_t r, const RowState& state, V* values) {
  const int64_t rows = c.policy.count;
  if (!c.counted(r)) {
    for (int64_t f = 0; f < c.fields.rows; f++) values[f * rows + r] = 0;
    return;
  }
  const RowState s = no_mass(c.fields, state) ? nan_state() : state;
  auto put = [&](int64_t field, double v) { values[field * rows + r] = static_cast<V>(v); };
  row_values(c.fields, s, put);
  for (int64_t k = 0; k < c.ids_per_row; k++) {
    const double x = load_double(c.policy.row(r), c.policy.dtype, c.ids[r * c.ids_per_row + k]);
    put(c.fields.logprob + k, (x * c.inv_t(r) - s.policy_max) - s.policy_log_sum);
  }
}

void finish_row(const ForwardCall& c, int64_t r, const RowState* parts) {
  RowState s{};
  if (c.counted(r)) {
    s = merge(parts, static_cast<int>(c.segments()), c.inv_t(r));
    s.whole = 1;
  }
  static_cast<RowState*>(c.state.mutable_data_ptr())[r] = s;
  if (c.f64) write_values(c, r, s, static_cast<double*>(c.values.mutable_data_ptr()));
  else write_values(c, r, s, static_cast<float*>(c.values.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> row_stats(const Tensor& policy, const std::optional<Tensor>& reference,
                                     const std::optional<Tensor>& token_ids, const std::vector<std::string>& fields,
                                     std::optional<double> parameter, const std::optional<Tensor>& inv_temperature,
                                     const std::optional<Tensor>& mask, std::optional<int64_t> valid_vocab,
                                     std::optional<double> softcap) {
  const ForwardCall c(policy, reference, token_ids, fields, inv_temperature, mask, {parameter, valid_vocab, softcap});
  const int64_t rows = c.policy.count, segments = c.segments(), threads = torch::stable::get_num_threads();
  if (segments > 1 && rows < 4 * threads && threads > 1) {  // few long rows: threads share a row
    std::vector<RowState> parts(static_cast<size_t>(rows * segments));
    torch::stable::parallel_for(0, rows * segments, grain_of(c.segment_length()), [&](int64_t begin, int64_t end) {
      Widened room;
      for (int64_t i = begin; i < end; i++)
        if (c.counted(i / segments)) parts[static_cast<size_t>(i)] = segment_state(c, i / segments, i % segments, room);
    });
    for (int64_t r = 0; r < rows; r++) finish_row(c, r, parts.data() + r * segments);
  } else {
    torch::stable::parallel_for(0, rows, grain_of(c.policy.length), [&](int64_t begin, int64_t end) {
      Widened room;
      std::vector<RowState> parts(static_cast<size_t>(segments));
      for (int64_t r = begin; r < end; r++) {
        for (int64_t i = 0; i < segments && c.counted(r); i++) parts[static_cast<size_t>(i)] = segment_state(c, r, i, room);
        finish_row(c, r, parts.data());
      }
    });
  }
  return {c.values, c.state};
}

}  // namespace fusedkl
