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
  static bool run(const ForwardArgs& a, int mode, bool shifted, Stream s) { return launch_forward<X, Y>(a, mode, shifted, s); }
};
template <DType X, DType Y>
struct Gradient {
  static bool run(const GradientArgs& a, bool plain, bool shifted, Stream s) {
    return launch_gradient<X, Y>(a, plain, shifted, s);
  }
};

bool shifted(const Call& c) {
  return misaligned(c.in.x, static_cast<int>(size_of(c.in.dx)), c.in.y, static_cast<int>(size_of(c.in.dy)));
}

RowState* states(const Tensor& t) { return static_cast<RowState*>(t.mutable_data_ptr()); }

FinishArgs finish_args(const Call& c, RowState* parts, const Tensor& state, const Tensor& values) {
  return {c.in, parts, states(state), values.mutable_data_ptr(), c.f64, c.at, c.value_count, c.ids, c.ids_per_row};
}

std::tuple<Tensor, Tensor> forward(const Call& c, const Tensor& like, const OnDevice& device) {
  const Tensor values =
      torch::stable::new_empty(like, {c.value_count, c.in.rows}, c.f64 ? ScalarType::Double : ScalarType::Float);
  const Tensor state = torch::stable::new_empty(like, {c.in.rows, kStateColumns}, ScalarType::Double);
  const bool whole = c.in.cut.count == 1;
  const Tensor parts =
      whole ? state : torch::stable::new_empty(like, {c.in.rows, c.in.cut.count * int64_t{kStateColumns}}, ScalarType::Double);
  RowState* const p = states(parts);
  if (!c.f64) device.check(by_dtype<Forward>(c.in.dx, c.in.dy, ForwardArgs{c.in, p}, c.mode(), shifted(c), device.stream));
  device.check(launch_finish(finish_args(c, p, state, values), device.stream));
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
    args.with_reference = c.with_reference;
    args.at = c.at;
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
    if (!call_.f64) device.check(by_dtype<Gradient>(call_.in.dx, call_.in.dy, args, plain_, shifted(call_), device.stream));
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
                                     const std::vector<std::string>& fields, std::optional<double>, const OptionalTensor& inverse,
                                     const OptionalTensor& mask, std::optional<int64_t> valid_vocab,
                                     std::optional<double> softcap) {
  const OnDevice device(policy);
  return forward(Call(policy, reference, token_ids, fields, inverse, mask, valid_vocab, softcap), policy, device);
}

std::tuple<Tensor, Tensor> row_stats_backward(const Tensor& grad, const Tensor& policy, const OptionalTensor& reference,
                                              const OptionalTensor& token_ids, const Tensor& state,
                                              const std::vector<std::string>& fields, std::optional<double>,
                                              const OptionalTensor& inverse, std::optional<int64_t> valid_vocab,
                                              std::optional<double> softcap, bool policy_grad, bool reference_grad) {
  STD_TORCH_CHECK(!reference_grad || reference, "there is no reference to have a gradient");
  const OnDevice device(policy);
  const Call c(policy, reference, token_ids, fields, inverse, std::nullopt, valid_vocab, softcap);
  const Tensor gx = new_gradient(policy_grad, policy), gy = new_gradient(reference_grad, reference ? *reference : policy);
  if (policy_grad || reference_grad)
    Backward(c, grad, state, policy_grad ? &gx : nullptr, reference_grad ? &gy : nullptr).run(device);
  return {gx, gy};
}

// The gradient replaces the policy's logits.
Tensor row_stats_backward_(const Tensor& grad, Tensor policy, const OptionalTensor& reference, const OptionalTensor& token_ids,
                           const Tensor& state, const std::vector<std::string>& fields, std::optional<double>,
                           const OptionalTensor& inverse, std::optional<int64_t> valid_vocab, std::optional<double> softcap,
                           bool reference_grad) {
  STD_TORCH_CHECK(!reference_grad || reference, "there is no reference to have a gradient");
  const OnDevice device(policy);
  const Call c(policy, reference, token_ids, fields, inverse, std::nullopt, valid_vocab, softcap);
  const Tensor gy = new_gradient(reference_grad, reference ? *reference : policy);
  Backward(c, grad, state, &policy, reference_grad ? &gy : nullptr).run(device);
  return gy;
}

std::tuple<Tensor, Tensor, Tensor> row_stats_with_gradient(const Tensor& grad, const Tensor& policy,
                                                           const OptionalTensor& reference,
                                                           const std::vector<std::string>& fields, std::optional<double>,
                                                           const OptionalTensor& inverse, const OptionalTensor& mask,
                                                           std::optional<int64_t> valid_vocab, std::optional<double> softcap) {
  const OnDevice device(policy);
  const Call c(policy, reference, std::nullopt, fields, inverse, mask, valid_vocab, softcap);
  const Tensor gx = new_gradient(true, policy);
  const bool alike = c.in.dx == c.in.dy && (c.in.dx == DType::bf16 || c.in.dx == DType::f32);
  ClusterArgs cluster{};
  if (alike && (c.mode() & ~kReverse) == 0 && c.ids_per_row == 0 && !shifted(c))
    cluster = cluster_for(c.in.length, 2 * size_of(c.in.dx));
  if (cluster.blocks == 0) {
    const auto [values, state] = forward(c, policy, device);
    Backward(c, grad, state, &gx, nullptr).run(device);
    return {values, state, gx};
  }
  // on chip; what must be done otherwise is found by the launches that follow, and most often there is nothing
  const Tensor values = torch::stable::new_empty(policy, {c.value_count, c.in.rows}, ScalarType::Float);
  const Tensor state = torch::stable::new_empty(policy, {c.in.rows, kStateColumns}, ScalarType::Double);
  const Tensor done = torch::stable::new_empty(policy, {c.in.rows}, ScalarType::Bool);
  Backward b(c, grad, state, &gx, nullptr);
  cluster.in = c.in;
  cluster.in.cut = {1, static_cast<int>(c.in.length)};
  cluster.gradient = b.args;
  cluster.parts = states(state);
  b.args.done = cluster.done = static_cast<bool*>(done.mutable_data_ptr());
  device.check(c.in.dx == DType::bf16 ? launch_cluster<DType::bf16>(cluster, b.plain(), device.stream)
                                      : launch_cluster<DType::f32>(cluster, b.plain(), device.stream));
  FinishArgs finish = finish_args(c, cluster.parts, state, values);
  finish.in = cluster.in;
  device.check(launch_finish(finish, device.stream));
  b.run(device);
  return {values, state, gx};
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
  a.at = value_rows(fields, 0, &value_count);
  STD_TORCH_CHECK(!a.at.tokens(), "log-probabilities of tokens are not numbers of a state");
  if (inverse) {
    a.inv_temperature = static_cast<const double*>(inverse->const_data_ptr());
    a.per_row_temperature = inverse->numel() != 1;
  }
  a.with_reference = a.at.forward_kl >= 0 || a.at.reverse_kl >= 0;
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
  Call c(logits, std::nullopt, std::nullopt, {}, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
  c.f64 |= dtype == ScalarType::Double;  // as exact as the result
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
  m.impl("_merge_states", TORCH_BOX(&fusedkl::gpu::merge_states));
  m.impl("_scale_gradient_", TORCH_BOX(&fusedkl::gpu::scale_gradient_));
  m.impl("_log_softmax", TORCH_BOX(&fusedkl::gpu::log_softmax));
  m.impl("_log_softmax_backward", TORCH_BOX(&fusedkl::gpu::log_softmax_backward));
  m.impl("_ordered_sum", TORCH_BOX(&fusedkl::gpu::ordered_sum));
}
