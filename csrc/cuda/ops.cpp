// The operators on CUDA tensors: checks, memory and launches. Schemas are defined in fusedkl/_library.py. Nothing here waits for
// the device. Compiled against the shim of tests/cuda_on_cpu, the same code serves CPU tensors.
#include "../cpu/tensors.h"
#include "launch.h"

#if !defined(FUSEDKL_ON_CPU)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

#include <tuple>

namespace fusedkl {
namespace gpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The device and the stream that PyTorch is on.
class OnDevice {
 public:
#if defined(FUSEDKL_ON_CPU)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* s = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &s));
    stream = static_cast<Stream>(s);
  }

 private:
  const torch::stable::accelerator::DeviceGuard guard_;

 public:
#endif
  Stream stream = nullptr;

  void check(bool launched) const {
#if !defined(FUSEDKL_ON_CPU)
    STD_TORCH_CHECK(launched, "a kernel did not launch: ", cudaGetErrorString(cudaGetLastError()));
#endif
    (void)launched;
  }
};

RowLayout layout_of(const Rows& rows, const char* name) {
  STD_TORCH_CHECK(rows.sizes().size() <= kMaxDims, name, " has more leading dimensions than kernels take (", kMaxDims,
                  "), none of which can be merged; make it contiguous");
  RowLayout l;
  l.data = static_cast<char*>(rows.data());
  l.dims = static_cast<int>(rows.sizes().size());
  for (int d = 0; d < l.dims; d++) {
    l.size[d] = rows.sizes()[static_cast<size_t>(d)];
    l.stride[d] = rows.strides()[static_cast<size_t>(d)] * size_of(rows.dtype);
  }
  return l;
}

// Which rows of `values` have which name. False for a name that these kernels do not know.
ValueRows value_rows(const std::vector<std::string>& fields, int64_t ids_per_row, int64_t* count) {
  static const std::pair<const char*, int64_t ValueRows::*> known[] = {
      {"forward_kl", &ValueRows::forward_kl}, {"reverse_kl", &ValueRows::reverse_kl},
      {"entropy", &ValueRows::entropy},       {"ref_entropy", &ValueRows::ref_entropy},
      {"logsumexp", &ValueRows::logsumexp},   {"ref_logsumexp", &ValueRows::ref_logsumexp},
      {"logprob", &ValueRows::logprob},       {"ref_logprob", &ValueRows::ref_logprob}};
  ValueRows at;
  *count = 0;
  for (const std::string& name : fields) {
    bool found = false;
    for (const auto& [text, member] : known)
      if (name == text) {
        STD_TORCH_CHECK(at.*member < 0, "field ", name, " is named twice");
        at.*member = *count;
        *count += name == "logprob" || name == "ref_logprob" ? ids_per_row : 1;
        found = true;
      }
    STD_TORCH_CHECK(found, "the cuda backend has no field ", name);
  }
  return at;
}

// The arguments that forward and backward share, checked, as plain data.
struct Call {
  Rows policy, reference;
  bool with_reference, f64;
  ValueRows at;
  int64_t value_count = 0, ids_per_row = 0;
  const int64_t* ids = nullptr;
  Inputs in{};

  Call(const Tensor& policy_, const OptionalTensor& reference_, const OptionalTensor& token_ids,
       const std::vector<std::string>& fields, const OptionalTensor& inverse, const OptionalTensor& mask,
       std::optional<int64_t> valid_vocab, std::optional<double> softcap)
      : policy(Rows::of(policy_, "policy")), reference(Rows::of(reference_ ? *reference_ : policy_, "reference")),
        with_reference(reference_.has_value()) {
    STD_TORCH_CHECK(!softcap, "the cuda backend has no softcap");
    const int64_t rows = policy.count, shorter = policy.length < reference.length ? policy.length : reference.length;
    STD_TORCH_CHECK(reference.count == rows && (valid_vocab || policy.length == reference.length),
                    "policy and reference differ in shape");
    STD_TORCH_CHECK(!valid_vocab || (*valid_vocab > 0 && *valid_vocab <= shorter), "valid_vocab: 1 to the shorter vocabulary");
    STD_TORCH_CHECK(shorter > 0, "the vocabulary is empty");
    STD_TORCH_CHECK(shorter < int64_t{1} << 31, "a row of 2^31 logits or more");
    if (token_ids) {
      ids_per_row = token_ids->size(token_ids->dim() - 1);
      STD_TORCH_CHECK(token_ids->scalar_type() == ScalarType::Long && token_ids->is_contiguous() &&
                          token_ids->numel() == rows * ids_per_row,
                      "token_ids: contiguous int64, the same number for each row");
      ids = static_cast<const int64_t*>(token_ids->const_data_ptr());
    }
    at = value_rows(fields, ids_per_row, &value_count);
    STD_TORCH_CHECK((at.logprob < 0 && at.ref_logprob < 0) || token_ids, "logprob needs token_ids");
    const bool pair = at.forward_kl >= 0 || at.reverse_kl >= 0 || at.ref_entropy >= 0 || at.ref_logsumexp >= 0 || at.ref_logprob >= 0;
    STD_TORCH_CHECK(!pair || with_reference, "a divergence needs a reference");
    f64 = policy.dtype == DType::f64 || reference.dtype == DType::f64;
    in.x = layout_of(policy, "policy");
    in.y = layout_of(reference, "reference");
    in.dx = policy.dtype;
    in.dy = reference.dtype;
    in.rows = rows;
    in.length = valid_vocab ? *valid_vocab : policy.length;
    const Segments cut(in.length);
    in.cut = {static_cast<int>(cut.count), static_cast<int>(cut.size)};
    if (inverse) {
      STD_TORCH_CHECK(inverse->scalar_type() == ScalarType::Double && inverse->is_contiguous() &&
                          (inverse->numel() == 1 || inverse->numel() == rows),
                      "inv_temperature: contiguous float64, one, or one per row");
      in.inv_temperature = static_cast<const double*>(inverse->const_data_ptr());
      in.per_row_temperature = inverse->numel() != 1;
    }
    if (mask) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == rows,
                      "mask: contiguous bool, one per row");
      in.mask = static_cast<const bool*>(mask->const_data_ptr());
    }
  }

  int mode() const {
    if (!with_reference) return kEntropy;  // about the largest logit: log p of a lone token is 0
    return (at.reverse_kl >= 0 ? kReverse : 0) | (at.entropy >= 0 ? kEntropy : 0) | (at.ref_entropy >= 0 ? kReferenceEntropy : 0);
  }
};

// Whether some row's reference cannot be read in aligned vectors where its policy is.
bool misaligned(const RowLayout& x, int size_x, const RowLayout& y, int size_y) {
  // elements from a row's start to the next boundary must agree modulo the shorter period
  const int64_t period = 16 / (size_x > size_y ? size_x : size_y);
  auto phase = [&](int64_t bytes, int size) { return (bytes / size) % period; };
  bool differ = phase(static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data) % 16), size_x) !=
                phase(static_cast<int64_t>(reinterpret_cast<uintptr_t>(y.data) % 16), size_y);
  if (x.dims != y.dims) {  // merged differently: aligned only if every row is
    for (int d = 0; d < x.dims; d++) differ |= x.stride[d] % 16 != 0;
    for (int d = 0; d < y.dims; d++) differ |= y.stride[d] % 16 != 0;
    return differ;
  }
  for (int d = 0; d < x.dims; d++)
    differ |= x.size[d] != y.size[d] || phase(x.stride[d], size_x) != phase(y.stride[d], size_y);
  return differ;
}

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
  static bool run(const GradientArgs& a, bool plain, bool shifted, Stream s) { return launch_gradient<X, Y>(a, plain, shifted, s); }
};

bool shifted(const Call& c) {
  return misaligned(c.in.x, static_cast<int>(size_of(c.in.dx)), c.in.y, static_cast<int>(size_of(c.in.dy)));
}

std::tuple<Tensor, Tensor> forward(const Call& c, const Tensor& like, const OnDevice& device) {
  const Tensor values = torch::stable::new_empty(like, {c.value_count, c.in.rows}, c.f64 ? ScalarType::Double : ScalarType::Float);
  const Tensor state = torch::stable::new_empty(like, {c.in.rows, kStateColumns}, ScalarType::Double);
  const bool whole = c.in.cut.count == 1;
  const Tensor parts =
      whole ? state : torch::stable::new_empty(like, {c.in.rows, c.in.cut.count * int64_t{kStateColumns}}, ScalarType::Double);
  RowState* const p = static_cast<RowState*>(parts.mutable_data_ptr());
  if (!c.f64) device.check(by_dtype<Forward>(c.in.dx, c.in.dy, ForwardArgs{c.in, p}, c.mode(), shifted(c), device.stream));
  device.check(launch_finish({c.in, p, static_cast<RowState*>(state.mutable_data_ptr()), values.mutable_data_ptr(), c.f64, c.at,
                              c.value_count, c.ids, c.ids_per_row},
                             device.stream));
  return {values, state};
}

void backward(const Call& c, const Tensor& grad, const Tensor& state, const Tensor* gx, const Tensor* gy, const OnDevice& device) {
  STD_TORCH_CHECK(state.is_contiguous() && state.size(0) == c.in.rows && state.size(1) == kStateColumns,
                  "state does not fit the policy");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == c.value_count && grad.size(1) == c.in.rows, "grad does not fit the fields");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float || grad.scalar_type() == ScalarType::Double,
                  "grad must be float32 or float64");
  GradientArgs a{};
  a.in = c.in;
  if (gx) a.gx = layout_of(Rows(*gx, "policy gradient", gx->mutable_data_ptr()), "policy gradient");
  if (gy) a.gy = layout_of(Rows(*gy, "reference gradient", gy->mutable_data_ptr()), "reference gradient");
  a.total_x = c.policy.length;
  a.total_y = c.reference.length;
  a.state = static_cast<const RowState*>(state.const_data_ptr());
  a.grad = grad.const_data_ptr();
  a.grad_f64 = grad.scalar_type() == ScalarType::Double;
  a.grad_stride[0] = grad.stride(0);
  a.grad_stride[1] = grad.stride(1);
  a.with_reference = c.with_reference;
  a.at = c.at;
  a.ids = c.ids;
  a.ids_per_row = c.ids_per_row;
  const int64_t frame_words = (static_cast<int64_t>(sizeof(GradientFrame)) + 7) / 8;
  const Tensor frames = torch::stable::new_empty(grad, {c.in.rows, frame_words}, ScalarType::Double);
  const Tensor tokens = torch::stable::new_empty(grad, {c.in.rows, c.ids_per_row}, ScalarType::Double);
  a.frames = static_cast<GradientFrame*>(frames.mutable_data_ptr());
  a.tokens = static_cast<double*>(tokens.mutable_data_ptr());
  device.check(launch_prepare(a, device.stream));
  const bool plain = gx && !gy && c.at.forward_kl >= 0 && c.value_count == 1;
  if (!c.f64) device.check(by_dtype<Gradient>(c.in.dx, c.in.dy, a, plain, shifted(c), device.stream));
}

Tensor new_gradient(bool wanted, const Tensor& like) {
  return wanted ? torch::stable::new_empty(like, sizes_of(like)) : torch::stable::new_empty(like, {0});
}

std::tuple<Tensor, Tensor> row_stats(const Tensor& policy, const OptionalTensor& reference, const OptionalTensor& token_ids,
                                     const std::vector<std::string>& fields, std::optional<double>, const OptionalTensor& inverse,
                                     const OptionalTensor& mask, std::optional<int64_t> valid_vocab, std::optional<double> softcap) {
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
  if (policy_grad || reference_grad) backward(c, grad, state, policy_grad ? &gx : nullptr, reference_grad ? &gy : nullptr, device);
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
  backward(c, grad, state, &policy, reference_grad ? &gy : nullptr, device);
  return gy;
}

std::tuple<Tensor, Tensor, Tensor> row_stats_with_gradient(const Tensor& grad, const Tensor& policy, const OptionalTensor& reference,
                                                           const std::vector<std::string>& fields, std::optional<double>,
                                                           const OptionalTensor& inverse, const OptionalTensor& mask,
                                                           std::optional<int64_t> valid_vocab, std::optional<double> softcap) {
  const OnDevice device(policy);
  const Call c(policy, reference, std::nullopt, fields, inverse, mask, valid_vocab, softcap);
  const auto [values, state] = forward(c, policy, device);
  const Tensor gx = new_gradient(true, policy);
  backward(c, grad, state, &gx, nullptr, device);
  return {values, state, gx};
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
  const Call c(logits, std::nullopt, std::nullopt, {}, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
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
  device.check(launch_scale({static_cast<char*>(gradient.mutable_data_ptr()), gradient.numel(), fusedkl::dtype_of(gradient, "gradient"),
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
  m.impl("_scale_gradient_", TORCH_BOX(&fusedkl::gpu::scale_gradient_));
  m.impl("_log_softmax", TORCH_BOX(&fusedkl::gpu::log_softmax));
  m.impl("_log_softmax_backward", TORCH_BOX(&fusedkl::gpu::log_softmax_backward));
  m.impl("_ordered_sum", TORCH_BOX(&fusedkl::gpu::ordered_sum));
}
