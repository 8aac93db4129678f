// fusedkl::_row_stats_backward, its in-place form, and forward and gradient in one visit to each row, on the CPU.
#include "rows.h"

namespace fusedkl {

constexpr int64_t kChunk = 2048;

BackwardCall::BackwardCall(const Tensor& grad_, const Tensor& policy_, const std::optional<Tensor>& reference_,
                           const std::optional<Tensor>& token_ids, const Tensor& state, const std::vector<std::string>& names,
                           const std::optional<Tensor>& inverse, const Controls& controls, const Tensor* policy_grad_,
                           const Tensor* reference_grad_)
    : policy(Rows::of(policy_, "policy")),
      reference(reference_ ? std::optional<Rows>(Rows::of(*reference_, "reference")) : std::nullopt),
      fields(names, token_ids ? token_ids->size(token_ids->dim() - 1) : 0, controls.parameter),
      grad(grad_),
      states(static_cast<const RowState*>(state.const_data_ptr())),
      ids(token_ids ? static_cast<const int64_t*>(token_ids->const_data_ptr()) : nullptr),
      ids_per_row(token_ids && fields.tokens() ? token_ids->size(token_ids->dim() - 1) : 0),
      inv_temperature(inverse ? static_cast<const double*>(inverse->const_data_ptr()) : nullptr),
      per_row_temperature(inverse && inverse->numel() != 1),
      cap(controls.softcap.value_or(0)) {
  cut_rows(policy, reference, controls);
  if (policy_grad_) policy_grad.emplace(*policy_grad_, "policy gradient", policy_grad_->mutable_data_ptr());
  if (reference_grad_) reference_grad.emplace(*reference_grad_, "reference gradient", reference_grad_->mutable_data_ptr());
  STD_TORCH_CHECK(state.is_contiguous() && state.dim() == 2 && state.size(0) == policy.count && state.size(1) == kStateColumns &&
                      state.scalar_type() == ScalarType::Double,
                  "state does not fit the policy");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == fields.rows && grad.size(1) == policy.count, "grad does not fit the fields");
  STD_TORCH_CHECK(!(fields.divergence() || fields.reference()) || reference, "a divergence needs a reference");
  STD_TORCH_CHECK(!inverse || (inverse->scalar_type() == ScalarType::Double && inverse->is_contiguous() &&
                               (inverse->numel() == 1 || inverse->numel() == policy.count)),
                  "inv_temperature: contiguous float64, one, or one per row");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float || grad.scalar_type() == ScalarType::Double,
                  "grad must be float32 or float64");
  STD_TORCH_CHECK(!ids_per_row || (token_ids->scalar_type() == ScalarType::Long && token_ids->is_contiguous() &&
                                   token_ids->numel() == policy.count * ids_per_row),
                  "token_ids: contiguous int64, the same number for each row");
  for (int64_t i = 0; i < policy.count * ids_per_row; i++)  // those of a masked row may be anything
    STD_TORCH_CHECK(ids[i] < policy.length || !live(i / ids_per_row), "token_ids must be from -1 to ", policy.length - 1,
                    "; got ", ids[i]);
  kernels();
}

double BackwardCall::grad_at(int64_t field, int64_t r) const {
  if (field < 0) return 0;
  const int64_t i = field * grad.stride(0) + r * grad.stride(1);
  return grad.scalar_type() == ScalarType::Double ? static_cast<const double*>(grad.const_data_ptr())[i]
                                                  : static_cast<const float*>(grad.const_data_ptr())[i];
}

bool BackwardCall::live(int64_t r) const {
  for (int64_t i = 0; i < fields.rows; i++)
    if (grad_at(i, r) != 0) return true;
  return false;
}

void MixedRow::widen(GradientJob& job, DType dx, DType dy) {
  auto fill = [&](std::vector<float>& room, const void*& row, DType d) {
    room.resize(static_cast<size_t>(job.n));
    kernels().widen[static_cast<int>(d)](row, room.data(), job.n);
    row = room.data();
  };
  fill(x, job.x, dx);
  if (job.y) fill(y, job.y, dy);
}

double BackwardCall::token_grad(int64_t field, int64_t k, int64_t r) const { return field < 0 ? 0 : grad_at(field + k, r); }

// In fp32, each gradient over its own logits, then rounded once into its own dtype.
static void widened_at_once(GradientJob job, DType dx, DType dy, MixedRow& room) {
  const KernelTable& k = kernels();
  void *const gx = job.gx, *const gy = job.gy;
  room.widen(job, dx, dy);
  job.gx = gx ? room.x.data() : nullptr;
  job.gy = gy ? room.y.data() : nullptr;
  if (job.gradient.family()) k.family_gradient[0](job);
  else k.gradient[0](job);
  if (gx) k.narrow[static_cast<int>(dx)](room.x.data(), gx, job.n);
  if (gy) k.narrow[static_cast<int>(dy)](room.y.data(), gy, job.n);
}

static GradientJob part_of(GradientJob job, DType dx, DType dy, int64_t from, int64_t most) {
  job.n = std::min(job.n - from, most);
  job.state.whole = 0;
  job.x = at(job.x, dx, from);
  if (job.y) job.y = at(job.y, dy, from);
  if (job.gx) job.gx = at(job.gx, dx, from);
  if (job.gy) job.gy = at(job.gy, dy, from);
  return job;
}

// By parts that stay in the cache, unless means may be taken over the whole row.
static void widened_gradient(const GradientJob& job, DType dx, DType dy, MixedRow& room) {
  const bool whole = job.state.whole != 0 && lacking_where(job, false, true, [] { return true; }).any();
  if (whole || job.gradient.family()) return widened_at_once(job, dx, dy, room);
  for (int64_t i = 0; i < job.n; i += kChunk) widened_at_once(part_of(job, dx, dy, i, kChunk), dx, dy, room);
}

// The same of a row under a softcap, where float can do it.
static bool capped_gradient(GradientJob job, DType dx, DType dy, MixedRow& room) {
  const SoftcapKernels& k = kernels().softcap;
  const GradientJob given = job;
  room.widen(job, dx, dy);
  double max;
  if (!(job.y ? k.pair(room.x.data(), room.y.data(), job.n, job.cap, max) : k.row(room.x.data(), job.n, job.cap, max)))
    return false;
  job.state = about_maximum(job.state, max, job.inv_t);
  job.gx = given.gx ? room.x.data() : nullptr;
  job.gy = given.gy ? room.y.data() : nullptr;
  if (!job.y) kernels().gradient[0](job);
  else if (job.gradient.family()) k.family_gradient(job);
  else k.gradient(job);
  if (given.gx) k.store[static_cast<int>(dx)](room.x.data(), given.x, given.gx, job.n, job.cap);
  if (given.gy) k.store[static_cast<int>(dy)](room.y.data(), given.y, given.gy, job.n, job.cap);
  return true;
}

static RowGrads grads_of_row(const BackwardCall& c, int64_t r) {
  const Fields& f = c.fields;
  RowGrads g;
  g.forward_kl = c.grad_at(f.forward_kl, r);
  g.reverse_kl = c.grad_at(f.reverse_kl, r);
  g.entropy = c.grad_at(f.entropy, r);
  g.logsumexp = c.grad_at(f.logsumexp, r);
  g.mean_logprob = c.grad_at(f.mean_logprob, r);
  g.ref_entropy = c.grad_at(f.ref_entropy, r);
  g.ref_logsumexp = c.grad_at(f.ref_logsumexp, r);
  for (int64_t k = 0; k < c.ids_per_row; k++) {
    g.logprob += c.token_grad(f.logprob, k, r);
    g.ref_logprob += c.token_grad(f.ref_logprob, k, r);
    g.log_ratio += c.token_grad(f.log_ratio, k, r);
  }
  return g;
}

// Their values before the sweep, which may overwrite the logits.
static std::vector<TokenGradient> token_gradients(const BackwardCall& c, int64_t r, const GradientJob& job) {
  const Fields& f = c.fields;
  std::vector<TokenGradient> tokens;
  for (int64_t k = 0; k < c.ids_per_row; k++) {
    const int64_t id = c.ids[r * c.ids_per_row + k];
    double to_policy = 0, to_reference = 0;
    bool seen = id < 0;
    for (int64_t j = 0; j < c.ids_per_row && !seen; j++) {
      if (c.ids[r * c.ids_per_row + j] != id) continue;
      seen = j < k;
      to_policy += c.token_grad(f.logprob, j, r) + c.token_grad(f.log_ratio, j, r);
      to_reference += c.token_grad(f.ref_logprob, j, r) - c.token_grad(f.log_ratio, j, r);
    }
    if (seen) continue;
    const Logits xs{c.policy.row(r), c.policy.dtype, c.cap};
    const Logits ys = c.reference ? Logits{c.reference->row(r), c.reference->dtype, c.cap} : xs;
    const double x = xs[id], y = c.reference ? ys[id] : -INFINITY;
    const SideGradients rest = gradients_at(job, x, y);
    if (job.gx && to_policy != 0)
      tokens.push_back({job.gx, c.policy.dtype, id, (rest.policy + to_policy * job.inv_t) * xs.slope(id)});
    if (job.gy && to_reference != 0)
      tokens.push_back({job.gy, c.reference->dtype, id, (rest.reference + to_reference * job.inv_t) * ys.slope(id)});
  }
  return tokens;
}

static void store(const std::vector<TokenGradient>& tokens) {
  for (const TokenGradient& t : tokens) store_double(t.row, t.dtype, t.id, t.value);
}

static void run_job(const GradientJob& job, DType dx, DType dy, bool elsewhere, MixedRow& room, LaterSweeps* later) {
  const bool exact = job.gradient.family() && elsewhere && (dx == DType::f32 || dy == DType::f32);
  const bool slice_in_double =
      exact && (saturated(job.kind, job.state) || sharp({job.x, dx, job.cap}, {job.y, dy, job.cap}, job.n, job.state, job.inv_t));
  const bool in_double = dx == DType::f64 || (job.y && dy == DType::f64) || beyond_float(job.state, job.inv_t) ||
                         slice_in_double || (job.gradient.family() && has_double_gradient(job.kind, job.state)) ||
                         (job.cap != 0 && (elsewhere || capped_too_coarse(job)));
  if (job.cap != 0 && !in_double && capped_gradient(job, dx, dy, room)) return;
  if (in_double || job.cap != 0) gradient_f64(job, dx, dy);
  else if (job.y && is_widened(dx, dy, job.state, job.inv_t)) widened_gradient(job, dx, dy, room);
  else if (job.gradient.family()) kernels().family_gradient[static_cast<int>(dx)](job);
  else if (later && !kernels().needs_whole_row[static_cast<int>(dx)](job)) later->jobs.emplace_back(job, dx);
  else kernels().gradient[static_cast<int>(dx)](job);
}

void gradient_of_row(const BackwardCall& c, int64_t r, MixedRow& room, LaterSweeps* later) {
  const DType dx = c.policy.dtype, dy = c.reference ? c.reference->dtype : dx;
  GradientJob job;
  job.n = c.policy.length;
  job.inv_t = !c.inv_temperature ? 1 : c.inv_temperature[c.per_row_temperature ? r : 0];
  job.cap = c.cap;
  job.state = settled(c.states[r]);
  const bool elsewhere = job.state.whole < 0;
  if (elsewhere) job.state.whole = 0;
  job.x = c.policy.row(r);
  if (c.policy_grad) job.gx = c.policy_grad->row(r);
  if (c.reference_grad) job.gy = c.reference_grad->row(r);

  // rows without an incoming gradient are exactly 0 and not read, whatever they and their temperature hold
  const bool live = c.live(r);
  if (live) {
    job.gradient = row_gradient(job.state, job.inv_t, grads_of_row(c, r));
    job.kind = c.fields.kind;
    if (c.fields.family >= 0) add_family_gradient(job.gradient, job.kind, job.state, job.inv_t, c.grad_at(c.fields.family, r));
  }
  auto zero_from = [&](const Rows& gradient, int64_t column) {
    memset(gradient.row(r, column), 0, static_cast<size_t>((gradient.length - column) * size_of(gradient.dtype)));
  };
  if (job.gx) zero_from(*c.policy_grad, live ? job.n : 0);
  if (job.gy) zero_from(*c.reference_grad, live ? job.n : 0);
  if (!live) return;

  // no distribution: no token of it may look like one that was merely masked
  auto all_nan = [&](void*& gradient, DType d) {
    for (int64_t i = 0; i < job.n; i++) store_double(gradient, d, i, NAN);
    gradient = nullptr;
  };
  if (job.gx && job.gradient.policy_nan()) all_nan(job.gx, dx);
  if (job.gy && job.gradient.reference_nan()) all_nan(job.gy, dy);
  if (!job.gx && !job.gy) return;

  std::vector<TokenGradient> tokens = token_gradients(c, r, job);
  // in place, the reference's gradient may read the policy first
  if (job.gx && job.gradient.policy_zero() && !(job.gx == job.x && job.gy && job.gradient.paired())) {
    zero_from(*c.policy_grad, 0);
    job.gx = nullptr;
  }
  if (job.gy && job.gradient.reference_zero()) {
    zero_from(*c.reference_grad, 0);
    job.gy = nullptr;
  }
  if (job.gradient.paired()) {
    job.y = c.reference->row(r);
    run_job(job, dx, dy, elsewhere, room, later);
  } else {
    GradientJob other = job;
    other.state = reference_alone(job.state);
    other.gradient = reference_alone(job.gradient);
    other.gx = job.gy;
    job.gy = other.gy = nullptr;
    if (other.gx) {
      other.x = c.reference->row(r);
      run_job(other, dy, dy, elsewhere, room, later);
    }
    if (job.gx) run_job(job, dx, dx, elsewhere, room, later);
  }
  if (later) later->tokens = std::move(tokens);
  else store(tokens);
}

// The forward sweep's segments: a logit's gradient is the same wherever its row is cut.
static void run_segment(const GradientJob& job, DType d, int64_t segment) {
  const int64_t size = Segments(job.n).size;
  kernels().gradient[static_cast<int>(d)](part_of(job, d, d, segment * size, size));
}

// Few long rows: threads share a row.
static void run_by_segments(const BackwardCall& c) {
  std::vector<LaterSweeps> rows(static_cast<size_t>(c.policy.count));
  torch::stable::parallel_for(0, c.policy.count, 1, [&](int64_t begin, int64_t end) {
    MixedRow room;
    for (int64_t r = begin; r < end; r++) gradient_of_row(c, r, room, &rows[static_cast<size_t>(r)]);
  });
  std::vector<std::pair<GradientJob, DType>> jobs;
  for (const LaterSweeps& row : rows) jobs.insert(jobs.end(), row.jobs.begin(), row.jobs.end());
  const Segments seg(c.policy.length);
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()) * seg.count, grain_of(seg.size),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; i++) {
                                  const auto& [job, dtype] = jobs[static_cast<size_t>(i / seg.count)];
                                  run_segment(job, dtype, i % seg.count);
                                }
                              });
  for (const LaterSweeps& row : rows) store(row.tokens);
}

static void run(const BackwardCall& c) {
  if (few_long_rows(c.policy.count, Segments(c.policy.length).count)) return run_by_segments(c);
  torch::stable::parallel_for(0, c.policy.count, grain_of(c.policy.length), [&](int64_t begin, int64_t end) {
    MixedRow room;
    for (int64_t r = begin; r < end; r++) gradient_of_row(c, r, room, nullptr);
  });
}

static Tensor gradient_if(bool wanted, const Tensor& like, const char* name) {
  return wanted ? new_gradient(like, dtype_of(like, name)) : torch::stable::new_empty(like, {0});
}

std::tuple<Tensor, Tensor> row_stats_backward(const Tensor& grad, const Tensor& policy, const std::optional<Tensor>& reference,
                                              const std::optional<Tensor>& token_ids, const Tensor& state,
                                              const std::vector<std::string>& fields, std::optional<double> parameter,
                                              const std::optional<Tensor>& inv_temperature, std::optional<int64_t> valid_vocab,
                                              std::optional<double> softcap, bool policy_grad, bool reference_grad) {
  STD_TORCH_CHECK(!reference_grad || reference, "there is no reference to have a gradient");
  const Tensor gx = gradient_if(policy_grad, policy, "policy"),
               gy = gradient_if(reference_grad, reference ? *reference : policy, "reference");
  run({grad,
       policy,
       reference,
       token_ids,
       state,
       fields,
       inv_temperature,
       {parameter, valid_vocab, softcap},
       policy_grad ? &gx : nullptr,
       reference_grad ? &gy : nullptr});
  return {gx, gy};
}

// The gradient replaces the policy's logits.
Tensor row_stats_backward_(const Tensor& grad, Tensor policy, const std::optional<Tensor>& reference,
                           const std::optional<Tensor>& token_ids, const Tensor& state, const std::vector<std::string>& fields,
                           std::optional<double> parameter, const std::optional<Tensor>& inv_temperature,
                           std::optional<int64_t> valid_vocab, std::optional<double> softcap, bool reference_grad) {
  STD_TORCH_CHECK(!reference_grad || reference, "there is no reference to have a gradient");
  const Tensor gy = gradient_if(reference_grad, reference ? *reference : policy, "reference");
  run({grad,
       policy,
       reference,
       token_ids,
       state,
       fields,
       inv_temperature,
       {parameter, valid_vocab, softcap},
       &policy,
       reference_grad ? &gy : nullptr});
  return gy;
}

// Values, state and the policy's gradient for gradients known beforehand: the second read of a row finds it in the cache.
std::tuple<Tensor, Tensor, Tensor> row_stats_with_gradient(
    const Tensor& grad, const Tensor& policy, const std::optional<Tensor>& reference, const std::vector<std::string>& fields,
    std::optional<double> parameter, const std::optional<Tensor>& inv_temperature, const std::optional<Tensor>& mask,
    std::optional<int64_t> valid_vocab, std::optional<double> softcap) {
  const Controls controls{parameter, valid_vocab, softcap};
  const ForwardCall f(policy, reference, std::nullopt, fields, inv_temperature, mask, controls);
  const Tensor gx = new_gradient(policy, dtype_of(policy, "policy"));
  const BackwardCall b(grad, policy, reference, std::nullopt, f.state, fields, inv_temperature, controls, &gx, nullptr);
  if (few_long_rows(f.policy.count, f.segments())) {
    forward_by_segments(f);
    run(b);
    return {f.values, f.state, gx};
  }
  torch::stable::parallel_for(0, f.policy.count, grain_of(f.policy.length), [&](int64_t begin, int64_t end) {
    Widened wide;
    MixedRow room;
    std::vector<RowState> parts(static_cast<size_t>(f.segments()));
    for (int64_t r = begin; r < end; r++) {
      forward_row(f, r, parts, wide);
      gradient_of_row(b, r, room, nullptr);
    }
  });
  return {f.values, f.state, gx};
}

// gradient *= factor, 0-d; nothing is touched where it is 1, and 0 silences even NaN
void scale_gradient_(Tensor gradient, const Tensor& factor) {
  const DType d = dtype_of(gradient, "gradient");
  const double by = load_double(factor.const_data_ptr(), dtype_of(factor, "factor"), 0);
  if (by == 1) return;
  void* const data = gradient.mutable_data_ptr();
  if (by == 0) {
    memset(data, 0, static_cast<size_t>(gradient.numel() * size_of(d)));
    return;
  }
  torch::stable::parallel_for(0, gradient.numel(), int64_t{1} << 18, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[kChunk]);
    if (d == DType::f64) {
      for (int64_t i = begin; i < end; i++) static_cast<double*>(data)[i] *= by;
      return;
    }
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t n = end - i < kChunk ? end - i : kChunk;
      kernels().widen[static_cast<int>(d)](at(data, d, i), room.get(), n);
      for (int64_t j = 0; j < n; j++) room[static_cast<size_t>(j)] *= static_cast<float>(by);
      kernels().narrow[static_cast<int>(d)](room.get(), at(data, d, i), n);
    }
  });
}

}  // namespace fusedkl
