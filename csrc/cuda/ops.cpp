// The operators on CUDA tensors: checks, memory and launches. Schemas are defined in fusedkl/_library.py. Nothing here waits for
// the device. Compiled against the shim of tests/cuda_on_cpu, the same code serves CPU tensors.
#include "call.h"

#include <tuple>

namespace fusedkl {
namespace gpu {
namespace {

template <template <DType, DType> class Launch, class... Args>
bool by_dtype(DType x, DType y, Args... args) {
  auto second = [&]<DType X>() {
    if (y == DType::f32) return Launch<X, DType::f32>::run(args...);
    if (y == DType::bf16) return Launch<X, DType::bf16>::run(args...);
    return Launch<X, DType::f16>::run(args...);
  };
  if (x == DType::f32) return second.template operator()<DType::f32>();
  if (x == DType::bf16) return second.template operator()<DType::bf16>();
  return second.template operator()<DType::f16>();
}

template <DType X, DType Y>
struct Forward {
  static bool run(const ForwardArgs& a, int mode, bool anywhere, Stream s) { return launch_forward<X, Y>(a, mode, anywhere, s); }
};
template <DType X, DType Y>
struct Gradient {
  static bool run(const GradientArgs& a, bool plain, bool shifted, Stream s) {
    return launch_gradient<X, Y>(a, plain, shifted, s);
  }
};

bool on_vectors(const Call& c) { return aligned(c.in.x) && aligned(c.in.y); }

struct FamilySweep {
  template <DType D>
  static bool vectors(const FamilyArgs& a, Stream s) {
    return launch_family_sums<D>(a, s);
  }
  static bool any(const FamilyArgs& a, Stream s) { return launch_any_family_sums(a, s); }
};
struct FamilyGradient {
  template <DType D>
  static bool vectors(const GradientArgs& a, Stream s) {
    return launch_family_gradient<D>(a, s);
  }
  static bool any(const GradientArgs& a, Stream s) { return launch_any_family_gradient(a, s); }
};

template <class Launch, class Args>
bool by_alignment(const Call& c, const Args& args, Stream stream) {
  if (c.in.dx != c.in.dy || !on_vectors(c)) return Launch::any(args, stream);
  if (c.in.dx == DType::f32) return Launch::template vectors<DType::f32>(args, stream);
  if (c.in.dx == DType::bf16) return Launch::template vectors<DType::bf16>(args, stream);
  return Launch::template vectors<DType::f16>(args, stream);
}

bool on_chip(const ClusterArgs& a, DType d, Stream stream) {
  return d == DType::bf16 ? launch_family_cluster<DType::bf16>(a, stream) : launch_family_cluster<DType::f32>(a, stream);
}

bool shifted(const Call& c) {
  return misaligned(c.in.x, static_cast<int>(size_of(c.in.dx)), c.in.y, static_cast<int>(size_of(c.in.dy)));
}

RowState* states(const Tensor& t) { return static_cast<RowState*>(t.mutable_data_ptr()); }

// A cluster that keeps both rows on chip, where this device has one and these dtypes their kernels.
ClusterArgs cluster_of(const Call& c) {
  const bool alike = c.in.dx == c.in.dy && (c.in.dx == DType::bf16 || c.in.dx == DType::f32);
  if (!alike || c.in.cap != 0 || c.at.mean_logprob >= 0) return {};
  if (c.kind.is_delicate()) return ClusterArgs{};  // its rows are taken in double
  ClusterArgs cluster = cluster_for(c.in.length, 2 * size_of(c.in.dx));
  cluster.in = c.in;
  cluster.in.cut = {1, static_cast<int>(c.in.length)};
  return cluster;
}

FinishArgs finish_args(const Call& c, RowState* parts, const Tensor& state, const Tensor& values) {
  return {c.in, parts, states(state), values.mutable_data_ptr(), c.f64, c.at, c.value_count, c.ids, c.ids_per_row};
}

// The second sweep, its rows' states known; `valued`: rows that have it already; `sums`: wanted instead of values.
void second_sweep(const Call& c, const Tensor& state, const Tensor& values, const Tensor* valued, const Tensor* sums,
                  const OnDevice& device) {
  const int64_t pieces = c.in.pieces(), columns = sizeof(FamilySums) / sizeof(double);
  const Tensor parts = torch::stable::new_empty(state, {c.in.rows, pieces * columns}, ScalarType::Double),
               again = torch::stable::new_empty(state, {c.in.rows}, ScalarType::Bool);
  FamilyArgs a{};
  a.in = c.in;
  a.kind = FamilyParameters(c.kind);
  a.state = states(state);
  a.parts = static_cast<FamilySums*>(parts.mutable_data_ptr());
  a.again = static_cast<bool*>(again.mutable_data_ptr());
  a.valued = valued ? static_cast<const bool*>(valued->const_data_ptr()) : nullptr;
  a.values = static_cast<char*>(values.mutable_data_ptr()) + c.at.family * c.in.rows * (c.f64 ? 8 : 4);
  a.f64 = c.f64;
  a.sums = sums ? static_cast<double*>(sums->mutable_data_ptr()) : nullptr;
  for (; a.sweep < (sums ? 1 : 3); a.sweep++) {
    if (!c.in.exact()) device.check(by_alignment<FamilySweep>(c, a, device.stream));
    device.check(launch_family_finish(a, device.stream));
  }
}

std::tuple<Tensor, Tensor> empty_results(const Call& c, const Tensor& like) {
  return {torch::stable::new_empty(like, {c.value_count, c.in.rows}, c.f64 ? ScalarType::Double : ScalarType::Float),
          torch::stable::new_empty(like, {c.in.rows, kStateColumns}, ScalarType::Double)};
}

std::tuple<Tensor, Tensor> forward(const Call& c, const Tensor& like, const OnDevice& device) {
  const auto [values, state] = empty_results(c, like);
  ClusterArgs cluster = c.at.family >= 0 ? cluster_of(c) : ClusterArgs{};
  if (cluster.blocks > 0) {
    const Tensor valued = torch::stable::new_empty(like, {c.in.rows}, ScalarType::Bool);
    cluster.gradient.kind = FamilyParameters(c.kind);
    cluster.gradient.at = c.at;
    cluster.parts = states(state);
    cluster.valued = static_cast<bool*>(valued.mutable_data_ptr());
    device.check(on_chip(cluster, c.in.dx, device.stream));
    FinishArgs finish = finish_args(c, cluster.parts, state, values);
    finish.in = cluster.in;
    device.check(launch_finish(finish, device.stream));
    second_sweep(c, state, values, &valued, nullptr, device);
    return {values, state};
  }
  const bool whole = c.in.cut.count == 1;
  const Tensor parts =
      whole ? state : torch::stable::new_empty(like, {c.in.rows, c.in.cut.count * int64_t{kStateColumns}}, ScalarType::Double);
  RowState* const p = states(parts);
  if (!c.in.exact())
    device.check(by_dtype<Forward>(c.in.dx, c.in.dy, ForwardArgs{c.in, p}, c.mode(), !on_vectors(c), device.stream));
  device.check(launch_finish(finish_args(c, p, state, values), device.stream));
  if (c.at.family >= 0) second_sweep(c, state, values, nullptr, nullptr, device);
  return {values, state};
}

// The launches of a backward, and the memory between them.
class Backward {
 public:
  Backward(const Call& c, const Tensor& grad, const Tensor& state, const Tensor* gx, const Tensor* gy)
      : call_(c),
        frames_(torch::stable::new_empty(grad, {c.in.rows, (static_cast<int64_t>(sizeof(GradientFrame)) + 7) / 8},
                                         ScalarType::Double)),
        tokens_(torch::stable::new_empty(grad, {2, c.in.rows, c.ids_per_row}, ScalarType::Double)),
        plain_(gx && !gy && c.at.forward_kl >= 0 && c.value_count == 1) {
    STD_TORCH_CHECK(state.is_contiguous() && state.size(0) == c.in.rows && state.size(1) == kStateColumns,
                    "state does not fit the policy");
    STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == c.value_count && grad.size(1) == c.in.rows,
                    "grad does not fit the fields");
    STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float || grad.scalar_type() == ScalarType::Double,
                    "grad must be float32 or float64");
    args.in = c.in;
    if (gx) args.gx = layout_of(Rows(*gx, "policy gradient", gx->mutable_data_ptr()), "policy gradient");
    if (gy) args.gy = layout_of(Rows(*gy, "reference gradient", gy->mutable_data_ptr()), "reference gradient");
    args.total_x = c.policy.length;
    args.total_y = c.reference.length;
    args.state = static_cast<const RowState*>(state.const_data_ptr());
    args.grad = grad.const_data_ptr();
    args.grad_f64 = grad.scalar_type() == ScalarType::Double;
    args.grad_stride[0] = grad.stride(0);
    args.grad_stride[1] = grad.stride(1);
    args.at = c.at;
    args.kind = FamilyParameters(c.kind);
    args.ids = c.ids;
    args.ids_per_row = c.ids_per_row;
    args.frames = static_cast<GradientFrame*>(frames_.mutable_data_ptr());
    double* const tokens = static_cast<double*>(tokens_.mutable_data_ptr());
    if (gx && (c.at.logprob >= 0 || c.at.log_ratio >= 0)) args.tokens = tokens;
    if (gy && (c.at.ref_logprob >= 0 || c.at.log_ratio >= 0)) args.ref_tokens = tokens + c.in.rows * c.ids_per_row;
  }

  bool plain() const { return plain_; }

  void run(const OnDevice& device) const {
    device.check(launch_prepare(args, device.stream));
    if (call_.in.exact()) return;
    device.check(by_dtype<Gradient>(call_.in.dx, call_.in.dy, args, plain_, shifted(call_), device.stream));
    if (call_.at.family >= 0) device.check(by_alignment<FamilyGradient>(call_, args, device.stream));
  }

  GradientArgs args{};

 private:
  const Call& call_;
  const Tensor frames_, tokens_;
  const bool plain_;
};

Tensor new_gradient(bool wanted, const Tensor& like) {
  return wanted ? torch::stable::new_empty(like, sizes_of(like)) : torch::stable::new_empty(like, {0});
}

std::tuple<Tensor, Tensor> row_stats(const Tensor& policy, const OptionalTensor& reference, const OptionalTensor& token_ids,
                                     const std::vector<std::string>& fields, std::optional<double> parameter,
                                     const OptionalTensor& inverse, const OptionalTensor& mask,
                                     std::optional<int64_t> valid_vocab, std::optional<double> softcap) {
  const OnDevice device(policy);
  return forward(Call(policy, reference, token_ids, fields, parameter, inverse, mask, valid_vocab, softcap), policy, device);
}

std::tuple<Tensor, Tensor> row_stats_backward(const Tensor& grad, const Tensor& policy, const OptionalTensor& reference,
                                              const OptionalTensor& token_ids, const Tensor& state,
                                              const std::vector<std::string>& fields, std::optional<double> parameter,
                                              const OptionalTensor& inverse, std::optional<int64_t> valid_vocab,
                                              std::optional<double> softcap, bool policy_grad, bool reference_grad) {
  STD_TORCH_CHECK(!reference_grad || reference, "there is no reference to have a gradient");
  const OnDevice device(policy);
  const Call c(policy, reference, token_ids, fields, parameter, inverse, std::nullopt, valid_vocab, softcap);
  const Tensor gx = new_gradient(policy_grad, policy), gy = new_gradient(reference_grad, reference ? *reference : policy);
  if (policy_grad || reference_grad)
    Backward(c, grad, state, policy_grad ? &gx : nullptr, reference_grad ? &gy : nullptr).run(device);
  return {gx, gy};
}

// The gradient replaces the policy's logits.
Tensor row_stats_backward_(const Tensor& grad, Tensor policy, const OptionalTensor& reference, const OptionalTensor& token_ids,
                           const Tensor& state, const std::vector<std::string>& fields, std::optional<double> parameter,
                           const OptionalTensor& inverse, std::optional<int64_t> valid_vocab, std::optional<double> softcap,
                           bool reference_grad) {
  STD_TORCH_CHECK(!reference_grad || reference, "there is no reference to have a gradient");
  const OnDevice device(policy);
  const Call c(policy, reference, token_ids, fields, parameter, inverse, std::nullopt, valid_vocab, softcap);
  const Tensor gy = new_gradient(reference_grad, reference ? *reference : policy);
  Backward(c, grad, state, &policy, reference_grad ? &gy : nullptr).run(device);
  return gy;
}

std::tuple<Tensor, Tensor, Tensor> row_stats_with_gradient(const Tensor& grad, const Tensor& policy,
                                                           const OptionalTensor& reference,
                                                           const std::vector<std::string>& fields,
                                                           std::optional<double> parameter, const OptionalTensor& inverse,
                                                           const OptionalTensor& mask, std::optional<int64_t> valid_vocab,
                                                           std::optional<double> softcap) {
  const OnDevice device(policy);
  const Call c(policy, reference, std::nullopt, fields, parameter, inverse, mask, valid_vocab, softcap);
  const Tensor gx = new_gradient(true, policy);
  const bool family = c.at.family >= 0;
  ClusterArgs cluster = family || (c.mode() & ~kReverse) == 0 ? cluster_of(c) : ClusterArgs{};
  if (cluster.blocks == 0) {
    const auto [values, state] = forward(c, policy, device);
    Backward(c, grad, state, &gx, nullptr).run(device);
    return {values, state, gx};
  }
  // on chip; what must be done otherwise is found by the launches that follow, and most often there is nothing
  const auto [values, state] = empty_results(c, policy);
  const Tensor done = torch::stable::new_empty(policy, {c.in.rows}, ScalarType::Bool),
               valued = torch::stable::new_empty(policy, {family ? c.in.rows : 0}, ScalarType::Bool);
  Backward b(c, grad, state, &gx, nullptr);
  cluster.gradient = b.args;
  cluster.parts = states(state);
  b.args.done = cluster.done = static_cast<bool*>(done.mutable_data_ptr());
  if (family) cluster.valued = static_cast<bool*>(valued.mutable_data_ptr());
  if (family) device.check(on_chip(cluster, c.in.dx, device.stream));
  else if (c.in.dx == DType::bf16) device.check(launch_cluster<DType::bf16>(cluster, b.plain(), device.stream));
  else device.check(launch_cluster<DType::f32>(cluster, b.plain(), device.stream));
  FinishArgs finish = finish_args(c, cluster.parts, state, values);
  finish.in = cluster.in;
  device.check(launch_finish(finish, device.stream));
  if (family) second_sweep(c, state, values, &valued, nullptr, device);
  b.run(device);
  return {values, state, gx};
}

// The sums of a second sweep over a slice of the vocabulary, given the state of the whole rows.
Tensor row_sums(const Tensor& policy, const Tensor& reference, const Tensor& state, std::string field,
                std::optional<double> parameter, const OptionalTensor& inverse, const OptionalTensor& mask,
                std::optional<int64_t> valid_vocab, std::optional<double> softcap) {
  const OnDevice device(policy);
  const Call c(policy, reference, std::nullopt, {field}, parameter, inverse, mask, valid_vocab, softcap);
  STD_TORCH_CHECK(c.at.family >= 0, "field ", field, " takes no second sweep");
  STD_TORCH_CHECK(state.is_contiguous() && state.size(0) == c.in.rows && state.size(1) == kStateColumns &&
                      state.scalar_type() == ScalarType::Double,
                  "state does not fit the policy");
  const Tensor out = torch::stable::new_empty(policy, {c.in.rows, 3}, ScalarType::Double);
  second_sweep(c, state, out, nullptr, &out, device);
  return out;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& parts, const std::vector<std::string>& fields,
                                        const OptionalTensor& inverse) {
  STD_TORCH_CHECK(parts.dim() == 3 && parts.size(2) == kStateColumns && parts.is_contiguous() &&
                      parts.scalar_type() == ScalarType::Double && parts.size(0) > 0,
                  "parts: contiguous float64 of shape [P, N, ", kStateColumns, "], P >= 1");
  const OnDevice device(parts);
  MergeArgs a{};
  a.count = parts.size(0);
  a.rows = parts.size(1);
  int64_t value_count = 0;
  FamilyKind kind;
  a.at = value_rows(fields, 0, 0, &kind, &value_count);
  STD_TORCH_CHECK(!a.at.tokens() && a.at.family < 0, "log-probabilities of tokens are not numbers of a state");
  if (inverse) {
    a.inv_temperature = static_cast<const double*>(inverse->const_data_ptr());
    a.per_row_temperature = inverse->numel() != 1;
  }
  const Tensor values = torch::stable::new_empty(parts, {value_count, a.rows}),
               state = torch::stable::new_empty(parts, {a.rows, kStateColumns}),
               room = torch::stable::new_empty(parts, {a.rows, a.count * int64_t{kStateColumns}});
  a.parts = static_cast<const RowState*>(parts.const_data_ptr());
  a.room = static_cast<RowState*>(room.mutable_data_ptr());
  a.state = static_cast<RowState*>(state.mutable_data_ptr());
  a.values = static_cast<double*>(values.mutable_data_ptr());
  device.check(launch_merge(a, device.stream));
  return {values, state};
}

DType dtype_of(ScalarType t) {
  return t == ScalarType::Float      ? DType::f32
         : t == ScalarType::BFloat16 ? DType::bf16
         : t == ScalarType::Half     ? DType::f16
                                     : DType::f64;
}

// log_softmax over the last dimension, any pair of dtypes
Tensor log_softmax(const Tensor& logits, ScalarType dtype) {
  const OnDevice device(logits);
  const Tensor out = torch::stable::new_empty(logits, sizes_of(logits), dtype);
  if (logits.numel() == 0) return out;
  Call c(logits, std::nullopt, std::nullopt, {}, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
  c.in.in_double = c.f64 |= dtype == ScalarType::Double;  // as exact as the result
  const auto [values, state] = forward(c, logits, device);
  LogSoftmaxArgs a{};
  a.in = c.in;
  a.out = layout_of(Rows(out, "result", out.mutable_data_ptr()), "result");
  a.dtype = dtype_of(dtype);
  a.state = static_cast<const RowState*>(state.const_data_ptr());
  device.check(launch_log_softmax(a, device.stream));
  return out;
}

Tensor log_softmax_backward(const Tensor& grad, const Tensor& output, ScalarType dtype) {
  const OnDevice device(output);
  const Rows g = Rows::of(grad, "grad"), o = Rows::of(output, "output");
  STD_TORCH_CHECK(g.count == o.count && g.length == o.length, "grad and output differ in shape");
  const Tensor out = torch::stable::new_empty(output, sizes_of(output), dtype);
  if (output.numel() == 0) return out;
  LogSoftmaxArgs a{};
  a.in.x = layout_of(o, "output");
  a.in.dx = o.dtype;
  a.in.rows = o.count;
  a.in.length = o.length;
  a.grad = layout_of(g, "grad");
  a.grad_dtype = g.dtype;
  a.out = layout_of(Rows(out, "result", out.mutable_data_ptr()), "result");
  a.dtype = dtype_of(dtype);
  device.check(launch_log_softmax_backward(a, device.stream));
  return out;
}

// sum of values times weights, accumulated in double in a fixed order
Tensor ordered_sum(const Tensor& values, const OptionalTensor& weight) {
  const OnDevice device(values);
  STD_TORCH_CHECK(values.dim() == 1 && (!weight || (weight->dim() == 1 && weight->size(0) == values.size(0))),
                  "values and weight: 1-D, of one length");
  const Tensor out = torch::stable::new_empty(values, {});
  SumArgs a{};
  a.values = values.const_data_ptr();
  a.dtype = a.weight_dtype = fusedkl::dtype_of(values, "values");
  a.count = values.size(0);
  a.stride = values.stride(0);
  if (weight) {
    a.weight = weight->const_data_ptr();
    a.weight_dtype = fusedkl::dtype_of(*weight, "weight");
    a.weight_stride = weight->stride(0);
  }
  a.out = out.mutable_data_ptr();
  device.check(launch_ordered_sum(a, device.stream));
  return out;
}

// gradient *= factor, 0-d and on the device
void scale_gradient_(Tensor gradient, const Tensor& factor) {
  const OnDevice device(gradient);
  STD_TORCH_CHECK(gradient.is_contiguous(), "gradient: contiguous");
  device.check(
      launch_scale({static_cast<char*>(gradient.mutable_data_ptr()), gradient.numel(), fusedkl::dtype_of(gradient, "gradient"),
                    factor.const_data_ptr(), fusedkl::dtype_of(factor, "factor")},
                   device.stream));
}

}  // namespace
}  // namespace gpu
}  // namespace fusedkl

#if defined(FUSEDKL_ON_CPU)
STABLE_TORCH_LIBRARY_IMPL(fusedkl_cuda_on_cpu, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fusedkl, CUDA, m) {
#endif
  m.impl("_row_stats", TORCH_BOX(&fusedkl::gpu::row_stats));
  m.impl("_row_stats_backward", TORCH_BOX(&fusedkl::gpu::row_stats_backward));
  m.impl("_row_stats_backward_", TORCH_BOX(&fusedkl::gpu::row_stats_backward_));
  m.impl("_row_stats_with_gradient", TORCH_BOX(&fusedkl::gpu::row_stats_with_gradient));
  m.impl("_row_sums", TORCH_BOX(&fusedkl::gpu::row_sums));
  m.impl("_merge_states", TORCH_BOX(&fusedkl::gpu::merge_states));
  m.impl("_scale_gradient_", TORCH_BOX(&fusedkl::gpu::scale_gradient_));
  m.impl("_log_softmax", TORCH_BOX(&fusedkl::gpu::log_softmax));
  m.impl("_log_softmax_backward", TORCH_BOX(&fusedkl::gpu::log_softmax_backward));
  m.impl("_ordered_sum", TORCH_BOX(&fusedkl::gpu::ordered_sum));
}
