// What the operators have in common: the stream, the arguments checked and as plain data.
#pragma once
#include "../cpu/tensors.h"
#include "launch.h"

#if !defined(FUSEDKL_ON_CPU)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fusedkl {
namespace gpu {

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

inline RowLayout layout_of(const Rows& rows, const char* name) {
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

inline std::optional<FamilyKind> family_of(const std::string& name, double parameter) {
  if (name == "jsd") return FamilyKind::jsd(parameter);
  if (name == "skew_kl") return FamilyKind::skew_kl(parameter);
  if (name == "renyi") return FamilyKind::renyi(parameter);
  if (name == "tvd") return FamilyKind::tvd();
  if (name == "hellinger") return FamilyKind::squared_hellinger();
  return std::nullopt;
}

// Which rows of `values` have which name; the kind of the one divergence that takes a second sweep.
inline ValueRows value_rows(const std::vector<std::string>& fields, int64_t ids_per_row, double parameter, FamilyKind* kind,
                            int64_t* count) {
  static const std::pair<const char*, int64_t ValueRows::*> known[] = {
      {"forward_kl", &ValueRows::forward_kl}, {"reverse_kl", &ValueRows::reverse_kl},
      {"entropy", &ValueRows::entropy},       {"ref_entropy", &ValueRows::ref_entropy},
      {"logsumexp", &ValueRows::logsumexp},   {"ref_logsumexp", &ValueRows::ref_logsumexp},
      {"logprob", &ValueRows::logprob},       {"ref_logprob", &ValueRows::ref_logprob},
      {"log_ratio", &ValueRows::log_ratio},   {"mean_logprob", &ValueRows::mean_logprob}};
  ValueRows at;
  *count = 0;
  for (const std::string& name : fields) {
    bool found = false;
    for (const auto& [text, member] : known)
      if (name == text) {
        STD_TORCH_CHECK(at.*member < 0, "field ", name, " is named twice");
        at.*member = *count;
        *count += name == "logprob" || name == "ref_logprob" || name == "log_ratio" ? ids_per_row : 1;
        found = true;
      }
    if (const auto family = found ? std::nullopt : family_of(name, parameter)) {
      STD_TORCH_CHECK(at.family < 0, "one divergence of a second sweep at a time");
      *kind = *family;
      at.family = (*count)++;
      found = true;
    }
    STD_TORCH_CHECK(found, "unknown field ", name);
  }
  STD_TORCH_CHECK(at.family < 0 || (at.forward_kl < 0 && at.reverse_kl < 0 && at.entropy < 0 && at.log_ratio < 0 &&
                                    at.ref_entropy < 0 && at.ref_logsumexp < 0 && at.ref_logprob < 0),
                  "a divergence of a second sweep goes with logsumexp, logprob and mean_logprob only");
  return at;
}

// The arguments that forward and backward share, checked, as plain data.
struct Call {
  Rows policy, reference;
  bool with_reference, f64;
  ValueRows at;
  FamilyKind kind;
  int64_t value_count = 0, ids_per_row = 0;
  const int64_t* ids = nullptr;
  Inputs in{};

  Call(const Tensor& policy_, const OptionalTensor& reference_, const OptionalTensor& token_ids,
       const std::vector<std::string>& fields, std::optional<double> parameter, const OptionalTensor& inverse,
       const OptionalTensor& mask, std::optional<int64_t> valid_vocab, std::optional<double> softcap)
      : policy(Rows::of(policy_, "policy")),
        reference(Rows::of(reference_ ? *reference_ : policy_, "reference")),
        with_reference(reference_.has_value()) {
    const int64_t rows = policy.count, shorter = policy.length < reference.length ? policy.length : reference.length;
    STD_TORCH_CHECK(reference.count == rows && (valid_vocab || policy.length == reference.length),
                    "policy and reference differ in shape");
    STD_TORCH_CHECK(!valid_vocab || (*valid_vocab > 0 && *valid_vocab <= shorter), "valid_vocab: 1 to the shorter vocabulary");
    STD_TORCH_CHECK(shorter > 0, "the vocabulary is empty");
    STD_TORCH_CHECK(shorter < int64_t{1} << 31, "a row of 2^31 logits or more");
    if (token_ids) {
      ids_per_row = token_ids->size(token_ids->dim() - 1);
      STD_TORCH_CHECK(
          token_ids->scalar_type() == ScalarType::Long && token_ids->is_contiguous() && token_ids->numel() == rows * ids_per_row,
          "token_ids: contiguous int64, the same number for each row");
      ids = static_cast<const int64_t*>(token_ids->const_data_ptr());
    }
    at = value_rows(fields, ids_per_row, parameter.value_or(0), &kind, &value_count);
    STD_TORCH_CHECK(!at.tokens() || token_ids, "logprob, ref_logprob and log_ratio need token_ids");
    const bool pair = at.forward_kl >= 0 || at.reverse_kl >= 0 || at.ref_entropy >= 0 || at.ref_logsumexp >= 0 ||
                      at.ref_logprob >= 0 || at.log_ratio >= 0 || at.family >= 0;
    STD_TORCH_CHECK(!pair || with_reference, "a divergence needs a reference");
    f64 = policy.dtype == DType::f64 || reference.dtype == DType::f64;
    in.x = layout_of(policy, "policy");
    in.y = layout_of(reference, "reference");
    in.dx = policy.dtype;
    in.dy = reference.dtype;
    in.cap = softcap.value_or(0);
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
    // about the largest logit: log p of a lone token is 0, and a second sweep knows a peaked row by it
    if (!with_reference || at.family >= 0) return kEntropy;
    return (at.reverse_kl >= 0 ? kReverse : 0) | (at.entropy >= 0 ? kEntropy : 0) | (at.ref_entropy >= 0 ? kReferenceEntropy : 0);
  }
};

// Whether every row begins on 16 bytes.
inline bool aligned(const RowLayout& l) {
  bool all = reinterpret_cast<uintptr_t>(l.data) % 16 == 0;
  for (int d = 0; d < l.dims; d++) all &= l.stride[d] % 16 == 0;
  return all;
}

// Whether some row's reference cannot be read in aligned vectors where its policy is.
inline bool misaligned(const RowLayout& x, int size_x, const RowLayout& y, int size_y) {
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
  for (int d = 0; d < x.dims; d++) differ |= x.size[d] != y.size[d] || phase(x.stride[d], size_x) != phase(y.stride[d], size_y);
  return differ;
}

}  // namespace gpu
}  // namespace fusedkl
