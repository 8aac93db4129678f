// What the operators need to know of a tensor: element type, rows at any strides, and memory for large results.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "job.h"

namespace fusedkl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64"); return DType::f32;
  }
}

inline ScalarType scalar_type_of(DType d) {
  return d == DType::f32    ? ScalarType::Float
         : d == DType::bf16 ? ScalarType::BFloat16
         : d == DType::f16  ? ScalarType::Half
                            : ScalarType::Double;
}

// The leading dimensions of a tensor as rows, at any strides (0 included); the last dimension must be dense.
class Rows {
 public:
  Rows(const Tensor& t, const char* name, void* data) : data_(static_cast<char*>(data)), dtype(dtype_of(t, name)) {
    const int64_t dim = t.dim();
    STD_TORCH_CHECK(dim >= 1, name, " needs a vocabulary dimension");
    length = t.size(dim - 1);
    STD_TORCH_CHECK(length <= 1 || t.stride(dim - 1) == 1, name, " must be dense in its last dimension");
    for (int64_t d = 0; d + 1 < dim; d++) {
      if (t.size(d) == 1) continue;
      sizes_.push_back(t.size(d));
      strides_.push_back(t.stride(d));
      count *= t.size(d);
    }
    // merge what is one stride in truth: most tensors end with one leading dimension and no division per row
    for (size_t d = sizes_.size(); d-- > 1;)
      if (strides_[d - 1] == sizes_[d] * strides_[d]) {
        sizes_[d - 1] *= sizes_[d];
        strides_[d - 1] = strides_[d];
        sizes_.erase(sizes_.begin() + static_cast<std::ptrdiff_t>(d));
        strides_.erase(strides_.begin() + static_cast<std::ptrdiff_t>(d));
      }
  }

  static Rows of(const Tensor& t, const char* name) { return Rows(t, name, const_cast<void*>(t.const_data_ptr())); }

  // row-major, without what is one stride in truth
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  void* data() const { return data_; }

  void* row(int64_t r, int64_t column = 0) const {
    int64_t offset = column;
    for (size_t d = sizes_.size(); d-- > 0;) {
      offset += r % sizes_[d] * strides_[d];
      r /= sizes_[d];
    }
    return data_ + offset * size_of(dtype);
  }

 private:
  char* data_;
  std::vector<int64_t> sizes_, strides_;

 public:
  DType dtype;
  int64_t count = 1, length = 0;
};

// Uninitialised and contiguous, on huge pages where it is large and the system grants them: page faults would otherwise be the
// largest single cost of it.
Tensor new_result(const Tensor& like, std::vector<int64_t> sizes, DType dtype);
// As large as `like`, in memory that is kept for the next one (kept_memory.h). Its storage cannot be resized, so this is not
// for results that are more than a gradient.
Tensor new_gradient(const Tensor& like, DType dtype);

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> s;
  for (int64_t d = 0; d < t.dim(); d++) s.push_back(t.size(d));
  return s;
}

const KernelTable& kernels();  // throws where FUSEDKL_CPU_ISA names what is not there

// Rows per task such that a task is worth waking a thread for (about half a million logits).
inline int64_t grain_of(int64_t row_length) {
  const int64_t grain = (int64_t{1} << 19) / (row_length > 0 ? row_length : 1);
  return grain > 0 ? grain : 1;
}

// A row is cut into equal segments that depend on its length alone, so that neither the number of threads nor the rest of the
// batch can show in the result.
struct Segments {
  int64_t count, size;
  explicit Segments(int64_t length) {
    constexpr int64_t kLongest = 65536, kAlign = 2048;
    count = (length + kLongest - 1) / kLongest;
    if (count < 1) count = 1;
    size = ((length + count - 1) / count + kAlign - 1) / kAlign * kAlign;
    count = length > 0 ? (length + size - 1) / size : 1;
  }
};

}  // namespace fusedkl
