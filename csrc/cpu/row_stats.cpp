// fusedkl::_row_stats on the CPU: rows over threads, long rows by segments, one RowState per row.
#include "rows.h"

namespace fusedkl {

void cut_rows(Rows& policy, std::optional<Rows>& reference, const Controls& controls) {
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
      fields(names, token_ids ? token_ids->size(token_ids->dim() - 1) : 0, controls.parameter) {
  cut_rows(policy, reference, controls);
  const int64_t rows = policy.count, length = policy.length;
  STD_TORCH_CHECK(!(fields.divergence() || fields.reference()) || reference, "a divergence needs a reference");
  STD_TORCH_CHECK(length > 0, "the vocabulary is empty");
  cap = controls.softcap.value_or(0);
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
  STD_TORCH_CHECK(!fields.tokens() || token_ids, "logprob, ref_logprob and log_ratio need token_ids");
  if (fields.tokens()) {
    ids_per_row = token_ids->size(token_ids->dim() - 1);
    STD_TORCH_CHECK(
        token_ids->scalar_type() == ScalarType::Long && token_ids->is_contiguous() && token_ids->numel() == rows * ids_per_row,
        "token_ids: contiguous int64, the same number for each row");
    ids = static_cast<const int64_t*>(token_ids->const_data_ptr());
    for (int64_t i = 0; i < rows * ids_per_row; i++)
      STD_TORCH_CHECK(!counted(i / ids_per_row) || (ids[i] >= -1 && ids[i] < length), "token id ", ids[i],
                      " is outside of the vocabulary of ", length);
  }
  kernels();  // an unusable instruction set must throw here, not inside a parallel region
  values = torch::stable::new_empty(policy_, {fields.rows, rows}, f64 ? ScalarType::Double : ScalarType::Float);
  state = torch::stable::new_empty(policy_, {rows, kStateColumns}, ScalarType::Double);
}

float* Widened::fill(std::unique_ptr<float[]>& room, const void* from, DType d, int64_t n) {
  if (!room) room.reset(new float[static_cast<size_t>(Segments(int64_t{1} << 40).size)]);
  kernels().widen[static_cast<int>(d)](from, room.get(), n);
  return room.get();
}

// A segment as it is stored, or in fp32: rows of two dtypes, and 16-bit rows far apart.
static RowState divergence_in_float(const Logits& x, const Logits& y, int64_t n, double inv_t, bool reverse, bool& entropies,
                                    Widened& room) {
  bool coarse = x.dtype != y.dtype, made = entropies;
  RowState s;
  if (!coarse) s = kernels().divergence[static_cast<int>(x.dtype)](x.data, y.data, n, inv_t, reverse, made, coarse);
  if (coarse) {
    made = entropies;
    const float *const wide_x = room.policy(x.data, x.dtype, n), *const wide_y = room.reference(y.data, y.dtype, n);
    s = kernels().divergence[0](wide_x, wide_y, n, inv_t, reverse, made, coarse);
  }
  entropies = made;
  return s;
}

// A segment under a softcap: in float where that holds, else in double.
static RowState capped_divergence(const Logits& x, const Logits& y, int64_t n, double inv_t, bool reverse, bool& entropies,
                                  Widened& room) {
  const SoftcapKernels& k = kernels().softcap;
  float *const d = room.policy(x.data, x.dtype, n), *const about = room.reference(y.data, y.dtype, n);
  RowState s;
  double max;
  if (k.pair(d, about, n, x.cap, max) && k.divergence(d, about, n, inv_t, reverse, entropies, s))
    return about_maximum(s, -max, inv_t);
  entropies = false;
  return divergence_f64(x, y, n, inv_t);
}

static RowState capped_single(const Logits& x, int64_t n, double inv_t, bool entropy, Widened& room) {
  float* const about = room.policy(x.data, x.dtype, n);
  double max;
  if (!kernels().softcap.row(about, n, x.cap, max)) return single_f64(x, n, inv_t);
  return about_maximum(kernels().single[0](about, n, inv_t, entropy), -max, inv_t);
}

static double capped_sum(const Logits& x, int64_t n, Widened& room) {
  float* const about = room.policy(x.data, x.dtype, n);
  double max;
  if (!kernels().softcap.row(about, n, x.cap, max)) return logit_sum(x, n);
  return kernels().logit_sum[0](about, n) + max * static_cast<double>(n);
}

RowState segment_state(const ForwardCall& c, int64_t r, int64_t segment, Widened& room) {
  const int64_t begin = segment * c.segment_length(), left = c.policy.length - begin,
                n = left < c.segment_length() ? left : c.segment_length();
  const void* x = c.policy.row(r, begin);
  const DType dx = c.policy.dtype;
  const double inv_t = c.inv_t(r);
  RowState s{};
  const bool wants_entropy = c.fields.entropy >= 0 || c.fields.ref_entropy >= 0;
  bool entropies = wants_entropy, paired = c.fields.divergence();
  if (paired) {
    const void* y = c.reference->row(r, begin);
    const DType dy = c.reference->dtype;
    const bool reverse = c.fields.reverse_kl >= 0;
    if (c.in_double(inv_t)) s = divergence_f64({x, dx, c.cap}, {y, dy, c.cap}, n, inv_t), entropies = false;
    else if (c.cap != 0) s = capped_divergence({x, dx, c.cap}, {y, dy, c.cap}, n, inv_t, reverse, entropies, room);
    else s = divergence_in_float({x, dx}, {y, dy}, n, inv_t, reverse, entropies, room);
    paired = s.residual == s.residual;  // else one side is no distribution; the other may be
    // a float sum knows log S to 1e-7: small entropies take a sweep of their own
    entropies = entropies && s.entropy > 0.05 && s.reference_entropy > 0.05;
  }
  auto alone = [&](const void* row, DType d, bool entropy) {
    if (c.in_double(inv_t)) return single_f64({row, d, c.cap}, n, inv_t);
    if (c.cap != 0) return capped_single({row, d, c.cap}, n, inv_t, entropy, room);
    return kernels().single[static_cast<int>(d)](row, n, inv_t, entropy);
  };
  if ((c.fields.policy() || !c.reference) && !(paired && (entropies || c.fields.entropy < 0))) {
    const RowState own = alone(x, dx, c.fields.entropy >= 0);
    s.policy_max = own.policy_max;
    s.policy_log_sum = own.policy_log_sum;
    s.entropy = own.entropy;
  }
  if (c.fields.reference() && !(paired && (entropies || c.fields.ref_entropy < 0))) {
    const RowState own = alone(c.reference->row(r, begin), c.reference->dtype, c.fields.ref_entropy >= 0);
    s.reference_max = own.policy_max;
    s.reference_log_sum = own.policy_log_sum;
    s.reference_entropy = own.entropy;
  }
  if (c.fields.mean_logprob >= 0) {
    s.tokens = static_cast<double>(n);
    s.logit_sum = inv_t * (dx == DType::f64 ? logit_sum({x, dx, c.cap}, n)
                           : c.cap != 0     ? capped_sum({x, dx, c.cap}, n, room)
                                            : kernels().logit_sum[static_cast<int>(dx)](x, n));
  }
  return s;
}

template <class V>
static void write_values(const ForwardCall& c, int64_t r, const RowState& state, V* values) {
  const int64_t rows = c.policy.count;
  if (!c.counted(r)) {
    for (int64_t f = 0; f < c.fields.rows; f++) values[f * rows + r] = 0;
    return;
  }
  const RowState s = settled(state);
  auto put = [&](int64_t field, double v) { values[field * rows + r] = static_cast<V>(v); };
  row_values(c.fields, s, put);
  const double inv_t = c.inv_t(r);
  for (int64_t k = 0; k < c.ids_per_row; k++) {
    const int64_t id = c.ids[r * c.ids_per_row + k];
    auto put_token = [&](int64_t field, auto value) {
      if (field >= 0) put(field + k, id < 0 ? 0 : value());
    };
    auto x = [&] { return Logits{c.policy.row(r), c.policy.dtype, c.cap}[id]; };
    auto y = [&] { return Logits{c.reference->row(r), c.reference->dtype, c.cap}[id]; };
    put_token(c.fields.logprob, [&] { return (x() * inv_t - s.policy_max) - s.policy_log_sum; });
    put_token(c.fields.ref_logprob, [&] { return (y() * inv_t - s.reference_max) - s.reference_log_sum; });
    put_token(c.fields.log_ratio, [&] { return ((x() - y()) - s.centre) * inv_t - s.residual; });
  }
}

static GradientJob family_job(const ForwardCall& c, int64_t r, int64_t segment, const RowState& row) {
  const int64_t begin = segment * c.segment_length();
  GradientJob job;
  job.n = std::min(c.segment_length(), c.policy.length - begin);
  job.inv_t = c.inv_t(r);
  job.state = row;
  job.cap = c.cap;
  job.kind = c.fields.kind;
  job.x = c.policy.row(r, begin);
  job.y = c.reference->row(r, begin);
  return job;
}

// Whether a softcap let it.
static bool sums_in_float(GradientJob job, DType dx, DType dy, Widened& room, FamilySums& sums) {
  if (job.cap == 0 && !is_widened(dx, dy, job.state, job.inv_t)) {
    sums = kernels().family_sums[static_cast<int>(dx)](job);
    return true;
  }
  float *const x = room.policy(job.x, dx, job.n), *const y = room.reference(job.y, dy, job.n);
  job.x = x;
  job.y = y;
  if (job.cap == 0) {
    sums = kernels().family_sums[0](job);
    return true;
  }
  const SoftcapKernels& k = kernels().softcap;
  double max;
  if (!k.pair(x, y, job.n, job.cap, max)) return false;
  job.state = about_maximum(job.state, max, job.inv_t);
  sums = k.family_sums(job);
  return true;
}

FamilySums segment_sums(const ForwardCall& c, int64_t r, int64_t segment, const RowState& row, Widened& room) {
  const DType dx = c.policy.dtype, dy = c.reference->dtype;
  const GradientJob job = family_job(c, r, segment, row);
  FamilySums sums;
  const bool exact = row.whole < 0 && (dx == DType::f32 || dy == DType::f32);
  const bool in_float = !c.in_double(job.inv_t) && !beyond_float(row, job.inv_t) && !job.kind.is_delicate() &&
                        !(exact && sharp({job.x, dx, job.cap}, {job.y, dy, job.cap}, job.n, row, job.inv_t)) &&
                        !(c.cap != 0 && capped_too_coarse(job));
  if (in_float && sums_in_float(job, dx, dy, room, sums) && is_finite(sums.value) && is_finite(sums.policy_slope) &&
      !(exact && one_sided(sums)))
    return sums;
  sums = family_sums_f64(job, dx, dy);
  // which sweeps in float leave out then: of one segment or slice alone they would be no sums over the row
  if (job.kind.family != Family::tvd && !may_want_mending(row)) sums.apart = sums.excess = 0;
  return sums;
}

// A second sweep sums p and q themselves, not their differences: the masses of a sharp row must be as exact as its log-ratio is.
static void sharpen_masses(const ForwardCall& c, int64_t r, RowState& s) {
  const double inv_t = c.inv_t(r);
  // rows under a cap are taken about their exact maximum
  if (c.in_double(inv_t) || c.cap != 0 || beyond_float(s, inv_t) || !is_finite(s.residual)) return;
  auto taken = [&](const Rows& rows, double& max, double& log_sum) {
    return rows.dtype == DType::f32 &&
           kernels().sharpen_mass(static_cast<const float*>(rows.row(r)), rows.length, inv_t, max, log_sum);
  };
  const bool policy = taken(c.policy, s.policy_max, s.policy_log_sum);
  const bool reference = taken(*c.reference, s.reference_max, s.reference_log_sum);
  const double centre = s.centre * inv_t;
  if (reference && !policy) {
    s.policy_max = s.reference_max + centre;
    s.policy_log_sum = s.reference_log_sum + s.residual;
  } else if (policy && !reference) {
    s.reference_max = s.policy_max - centre;
    s.reference_log_sum = s.policy_log_sum - s.residual;
  }
}

RowState merged_row(const ForwardCall& c, int64_t r, const RowState* parts) {
  RowState s = merge(parts, static_cast<int>(c.segments()), c.inv_t(r));
  s.whole = 1;
  if (c.fields.family >= 0) sharpen_masses(c, r, s);
  return s;
}

// The row's two sweeps in double.
static FamilySums family_in_double(const ForwardCall& c, int64_t r, RowState& s) {
  const DType dx = c.policy.dtype, dy = c.reference->dtype;
  std::vector<RowState> parts;
  for (int64_t i = 0; i < c.segments(); i++) {
    const GradientJob job = family_job(c, r, i, s);
    parts.push_back(divergence_f64({job.x, dx, c.cap}, {job.y, dy, c.cap}, job.n, job.inv_t));
  }
  RowState exact = merged_row(c, r, parts.data());
  exact.entropy = s.entropy;
  exact.reference_entropy = s.reference_entropy;
  exact.logit_sum = s.logit_sum;
  exact.tokens = s.tokens;
  s = exact;
  FamilySums sums;
  for (int64_t i = 0; i < c.segments(); i++) sums.add(family_sums_f64(family_job(c, r, i, s), dx, dy));
  return sums;
}

static void finish_family(const ForwardCall& c, int64_t r, RowState& s, FamilySums sums) {
  const FamilyKind& kind = c.fields.kind;
  const bool apart = hardly_overlap(kind, sums) || wants_log_sum(kind, sums);
  if (apart && !c.in_double(c.inv_t(r))) sums = family_in_double(c, r, s);
  if (!wants_log_sum(kind, sums)) return set_family(s, kind, sums, log(sums.policy_slope));
  LogSum log_sum;
  for (int64_t i = 0; i < c.segments(); i++) add_log_sum_f64(family_job(c, r, i, s), c.policy.dtype, c.reference->dtype, log_sum);
  set_family(s, kind, sums, log_sum.log_of());
}

void finish_row(const ForwardCall& c, int64_t r, const RowState& s) {
  static_cast<RowState*>(c.state.mutable_data_ptr())[r] = s;
  if (c.f64) write_values(c, r, s, static_cast<double*>(c.values.mutable_data_ptr()));
  else write_values(c, r, s, static_cast<float*>(c.values.mutable_data_ptr()));
}

void forward_row(const ForwardCall& c, int64_t r, std::vector<RowState>& parts, Widened& room) {
  RowState s{};
  if (c.counted(r)) {
    for (int64_t i = 0; i < c.segments(); i++) parts[static_cast<size_t>(i)] = segment_state(c, r, i, room);
    s = merged_row(c, r, parts.data());
    if (c.fields.family >= 0 && is_finite(s.residual)) {
      FamilySums sums;
      for (int sweeps = 0; sweeps == 0 || (sweeps < 3 && mend_log_ratio(s, sums)); sweeps++) {
        sums = FamilySums{};
        for (int64_t i = 0; i < c.segments(); i++) sums.add(segment_sums(c, r, i, s, room));
      }
      finish_family(c, r, s, sums);
    }
  }
  finish_row(c, r, s);
}

static void family_by_segments(const ForwardCall& c, std::vector<RowState>& rows) {
  const int64_t segments = c.segments(), count = c.policy.count;
  std::vector<FamilySums> parts(static_cast<size_t>(count * segments)), sums(static_cast<size_t>(count));
  std::vector<char> wanted(static_cast<size_t>(count));
  for (int64_t r = 0; r < count; r++) wanted[r] = c.counted(r) && is_finite(rows[r].residual);
  for (int sweeps = 0; sweeps < 3; sweeps++) {
    torch::stable::parallel_for(0, count * segments, grain_of(c.segment_length()), [&](int64_t begin, int64_t end) {
      Widened room;
      for (int64_t i = begin; i < end; i++)
        if (wanted[i / segments]) parts[i] = segment_sums(c, i / segments, i % segments, rows[i / segments], room);
    });
    for (int64_t r = 0; r < count; r++) {
      if (!wanted[r]) continue;
      sums[r] = FamilySums{};
      for (int64_t i = 0; i < segments; i++) sums[r].add(parts[r * segments + i]);
      wanted[r] = sweeps < 2 && mend_log_ratio(rows[r], sums[r]);
      if (!wanted[r]) finish_family(c, r, rows[r], sums[r]);
    }
  }
}

// Few long rows: threads share a row. The same segments in the same order as one thread has them.
void forward_by_segments(const ForwardCall& c) {
  const int64_t rows = c.policy.count, segments = c.segments(), grain = grain_of(c.segment_length());
  std::vector<RowState> parts(static_cast<size_t>(rows * segments)), merged(static_cast<size_t>(rows));
  torch::stable::parallel_for(0, rows * segments, grain, [&](int64_t begin, int64_t end) {
    Widened room;
    for (int64_t i = begin; i < end; i++)
      if (c.counted(i / segments)) parts[static_cast<size_t>(i)] = segment_state(c, i / segments, i % segments, room);
  });
  for (int64_t r = 0; r < rows; r++)
    if (c.counted(r)) merged[static_cast<size_t>(r)] = merged_row(c, r, parts.data() + r * segments);
  if (c.fields.family >= 0) family_by_segments(c, merged);
  for (int64_t r = 0; r < rows; r++) finish_row(c, r, merged[static_cast<size_t>(r)]);
}

std::tuple<Tensor, Tensor> row_stats(const Tensor& policy, const std::optional<Tensor>& reference,
                                     const std::optional<Tensor>& token_ids, const std::vector<std::string>& fields,
                                     std::optional<double> parameter, const std::optional<Tensor>& inv_temperature,
                                     const std::optional<Tensor>& mask, std::optional<int64_t> valid_vocab,
                                     std::optional<double> softcap) {
  const ForwardCall c(policy, reference, token_ids, fields, inv_temperature, mask, {parameter, valid_vocab, softcap});
  const int64_t rows = c.policy.count;
  if (few_long_rows(rows, c.segments())) {
    forward_by_segments(c);
  } else {
    torch::stable::parallel_for(0, rows, grain_of(c.policy.length), [&](int64_t begin, int64_t end) {
      Widened room;
      std::vector<RowState> parts(static_cast<size_t>(c.segments()));
      for (int64_t r = begin; r < end; r++) forward_row(c, r, parts, room);
    });
  }
  return {c.values, c.state};
}

// The sums of a second sweep over a slice of the vocabulary, given the state of the whole rows.
Tensor row_sums(const Tensor& policy, const Tensor& reference, const Tensor& state, std::string field,
                std::optional<double> parameter, const std::optional<Tensor>& inv_temperature, const std::optional<Tensor>& mask,
                std::optional<int64_t> valid_vocab, std::optional<double> softcap) {
  const ForwardCall c(policy, reference, std::nullopt, {field}, inv_temperature, mask, {parameter, valid_vocab, softcap});
  STD_TORCH_CHECK(c.fields.family >= 0, "field ", field, " takes no second sweep");
  STD_TORCH_CHECK(state.is_contiguous() && state.size(0) == c.policy.count && state.size(1) == kStateColumns &&
                      state.scalar_type() == ScalarType::Double,
                  "state does not fit the policy");
  const RowState* const states = static_cast<const RowState*>(state.const_data_ptr());
  const Tensor out = torch::stable::new_empty(policy, {c.policy.count, 3}, ScalarType::Double);
  double* const result = static_cast<double*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, c.policy.count, grain_of(c.policy.length), [&](int64_t begin, int64_t end) {
    Widened room;
    for (int64_t r = begin; r < end; r++) {
      FamilySums sums;
      for (int64_t i = 0; i < c.segments() && c.counted(r); i++) sums.add(segment_sums(c, r, i, states[r], room));
      if (states[r].whole < 0) take_means_as_summed(c.fields.kind, sums);
      result[3 * r] = sums.value;
      result[3 * r + 1] = sums.policy_slope;
      result[3 * r + 2] = sums.reference_slope;
    }
  });
  return out;
}

}  // namespace fusedkl
