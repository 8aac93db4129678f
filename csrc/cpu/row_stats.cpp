// fusedkl::_row_stats on the CPU: rows over threads, long rows by segments, one RowState per row.
#include <memory>

#include "fields.h"

namespace fusedkl {
namespace {

struct Call {
  const Rows policy;
  const std::optional<Rows> reference;
  const Fields fields;
  const double* inv_temperature = nullptr;  // one per row, or one for all
  bool per_row_temperature = false;
  const bool* mask = nullptr;
  bool f64 = false;

  double inv_t(int64_t r) const { return !inv_temperature ? 1 : inv_temperature[per_row_temperature ? r : 0]; }
  bool counted(int64_t r) const { return !mask || mask[r]; }
};

// Room for one segment of both rows in fp32, for rows whose dtypes differ; made at most once per task.
class Widened {
 public:
  const float* policy(const void* from, DType d, int64_t n) { return fill(policy_, from, d, n); }
  const float* reference(const void* from, DType d, int64_t n) { return fill(reference_, from, d, n); }

 private:
  static const float* fill(std::unique_ptr<float[]>& room, const void* from, DType d, int64_t n) {
    if (!room) room.reset(new float[static_cast<size_t>(Segments(int64_t{1} << 40).size)]);
    kernels().widen[static_cast<int>(d)](from, room.get(), n);
    return room.get();
  }
  std::unique_ptr<float[]> policy_, reference_;
};

RowState segment_state(const Call& c, int64_t r, int64_t begin, int64_t n, Widened& room) {
  const void* x = c.policy.row(r, begin);
  const DType dx = c.policy.dtype;
  const double inv_t = c.inv_t(r);
  RowState s{};
  if (c.fields.divergence()) {
    const void* y = c.reference->row(r, begin);
    const DType dy = c.reference->dtype;
    const bool reverse = c.fields.reverse_kl >= 0;
    if (c.f64) s = divergence_f64(x, dx, y, dy, n, inv_t);
    else if (dx == dy) s = kernels().divergence[static_cast<int>(dx)](x, y, n, inv_t, reverse);
    else s = kernels().divergence[0](room.policy(x, dx, n), room.reference(y, dy, n), n, inv_t, reverse);
  }
  if (c.fields.single()) {
    const bool entropy = c.fields.entropy >= 0;
    const RowState own = c.f64 ? single_f64(x, dx, n, inv_t) : kernels().single[static_cast<int>(dx)](x, n, inv_t, entropy);
    s.policy_max = own.policy_max;
    s.policy_log_sum = own.policy_log_sum;
    s.entropy = own.entropy;
  }
  return s;
}

RowState finish_row(const Call& c, int64_t r, const RowState* parts, int64_t count) {
  RowState s = merge(parts, static_cast<int>(count), c.inv_t(r));
  // a row without any mass is no distribution
  if (s.policy_log_sum == -INFINITY || (c.fields.divergence() && s.reference_log_sum == -INFINITY)) return nan_state();
  return s;
}

template <class V>
void write_values(const Call& c, int64_t r, int64_t rows, const RowState& s, const int64_t* ids, int64_t per_row, V* values) {
  auto put = [&](int64_t field, double v) {
    if (field >= 0) values[field * rows + r] = static_cast<V>(v);
  };
  put(c.fields.forward_kl, s.forward_kl);
  put(c.fields.reverse_kl, s.reverse_kl);
  put(c.fields.entropy, s.entropy);
  put(c.fields.logsumexp, s.policy_max + s.policy_log_sum);
  for (int64_t k = 0; c.fields.logprob >= 0 && k < per_row; k++) {
    const double x = load_double(c.policy.row(r), c.policy.dtype, ids[r * per_row + k]);
    put(c.fields.logprob + k, (x * c.inv_t(r) - s.policy_max) - s.policy_log_sum);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> row_stats(const Tensor& policy, const std::optional<Tensor>& reference, const std::optional<Tensor>& token_ids,
                                     const std::vector<std::string>& fields, const std::optional<Tensor>& inv_temperature,
                                     const std::optional<Tensor>& mask) {
  const int64_t per_row = token_ids ? token_ids->size(token_ids->dim() - 1) : 0;
  Call c{Rows::of(policy, "policy"), reference ? std::optional<Rows>(Rows::of(*reference, "reference")) : std::nullopt, Fields(fields, per_row)};
  const int64_t rows = c.policy.count, length = c.policy.length;
  STD_TORCH_CHECK(!c.fields.divergence() || reference, "a divergence needs a reference");
  STD_TORCH_CHECK(!reference || (c.reference->count == rows && c.reference->length == length), "policy and reference differ in shape");
  STD_TORCH_CHECK(length > 0, "the vocabulary is empty");
  c.f64 = c.policy.dtype == DType::f64 || (reference && c.reference->dtype == DType::f64);
  if (inv_temperature) {
    STD_TORCH_CHECK(inv_temperature->scalar_type() == ScalarType::Double && inv_temperature->is_contiguous(), "inv_temperature: contiguous float64");
    STD_TORCH_CHECK(inv_temperature->numel() == 1 || inv_temperature->numel() == rows, "inv_temperature: one, or one per row");
    c.inv_temperature = static_cast<const double*>(inv_temperature->const_data_ptr());
    c.per_row_temperature = inv_temperature->numel() != 1;
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == rows, "mask: contiguous bool, one per row");
    c.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  const int64_t* ids = nullptr;
  if (token_ids && c.fields.logprob >= 0) {
    STD_TORCH_CHECK(token_ids->scalar_type() == ScalarType::Long && token_ids->is_contiguous() && token_ids->numel() == rows * per_row,
                    "token_ids: contiguous int64, the same number for each row");
    ids = static_cast<const int64_t*>(token_ids->const_data_ptr());
    for (int64_t i = 0; i < rows * per_row; i++)
      STD_TORCH_CHECK(!c.counted(i / per_row) || (ids[i] >= 0 && ids[i] < length), "token id ", ids[i], " is outside of the vocabulary of ", length);
  }
  STD_TORCH_CHECK(c.fields.logprob < 0 || token_ids, "logprob needs token_ids");

  const Tensor values = torch::stable::new_empty(policy, {c.fields.rows, rows}, c.f64 ? ScalarType::Double : ScalarType::Float);
  const Tensor state = torch::stable::new_empty(policy, {rows, kStateColumns}, ScalarType::Double);
  RowState* const states = static_cast<RowState*>(state.mutable_data_ptr());
  void* const out = values.mutable_data_ptr();
  auto finish = [&](int64_t r, const RowState* parts, int64_t count) {
    states[r] = c.counted(r) ? finish_row(c, r, parts, count) : RowState{};
    if (!c.counted(r)) {
      for (int64_t f = 0; f < c.fields.rows; f++) {
        if (c.f64) static_cast<double*>(out)[f * rows + r] = 0;
        else static_cast<float*>(out)[f * rows + r] = 0;
      }
    } else if (c.f64) {
      write_values(c, r, rows, states[r], ids, per_row, static_cast<double*>(out));
    } else {
      write_values(c, r, rows, states[r], ids, per_row, static_cast<float*>(out));
    }
  };
  kernels();  // an unusable instruction set must throw here, not inside a parallel region
  const Segments seg(length);
  // in double, a row is not cut: it is the exact path, and its rows are short
  const int64_t parts_per_row = c.f64 ? 1 : seg.count, part = c.f64 ? length : seg.size;
  auto state_of = [&](int64_t r, int64_t i, Widened& room) {
    return segment_state(c, r, i * part, length - i * part < part ? length - i * part : part, room);
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (parts_per_row > 1 && rows < 4 * threads && threads > 1) {  // few long rows: threads share a row
    std::vector<RowState> parts(static_cast<size_t>(rows * parts_per_row));
    torch::stable::parallel_for(0, rows * parts_per_row, grain_of(part), [&](int64_t begin, int64_t end) {
      Widened room;
      for (int64_t i = begin; i < end; i++)
        if (c.counted(i / parts_per_row)) parts[static_cast<size_t>(i)] = state_of(i / parts_per_row, i % parts_per_row, room);
    });
    for (int64_t r = 0; r < rows; r++) finish(r, parts.data() + r * parts_per_row, parts_per_row);
  } else {
    torch::stable::parallel_for(0, rows, grain_of(length), [&](int64_t begin, int64_t end) {
      Widened room;
      std::vector<RowState> parts(static_cast<size_t>(parts_per_row));
      for (int64_t r = begin; r < end; r++) {
        for (int64_t i = 0; i < parts_per_row && c.counted(r); i++) parts[static_cast<size_t>(i)] = state_of(r, i, room);
        finish(r, parts.data(), parts_per_row);
      }
    });
  }
  return {values, state};
}

}  // namespace fusedkl
