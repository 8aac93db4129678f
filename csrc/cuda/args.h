// What the kernels are told, as plain data: no tensor, no torch.
#pragma once
#include "../cpu/dtype.h"
#include "../family_math.h"

namespace fusedkl {
namespace gpu {

constexpr int kMaxDims = 7;  // of the leading ones: layout.py copies what has more

// What a forward sweep is asked for besides forward KL and the masses.
constexpr int kReverse = 1, kEntropy = 2, kReferenceEntropy = 4;

// The leading dimensions of a tensor as rows, at any strides; offsets are 64-bit.
struct RowLayout {
  char* data = nullptr;
  int dims = 0;
  int64_t size[kMaxDims] = {}, stride[kMaxDims] = {};  // strides in bytes

  FUSEDKL_MEMBER char* row(int64_t r) const {
    if (dims <= 1) return data + r * stride[0];
    int64_t offset = 0;
    for (int d = dims; d-- > 0;) {
      offset += r % size[d] * stride[d];
      r /= size[d];
    }
    return data + offset;
  }
};

// Elements of a row per block of the sweeps that know its state.
constexpr int kPiece = 32768;

// A row is cut into equal segments that depend on its length alone.
struct Cut {
  int count, size;
};

struct Inputs {
  RowLayout x, y;  // without a reference, the policy stands in its place
  DType dx, dy;
  int64_t rows;
  int64_t length;  // logits that exist; the tensors may be longer
  Cut cut;
  const double* inv_temperature;  // null: 1
  bool per_row_temperature;
  const bool* mask;  // null: every row counts
  double cap;        // logits are cap tanh(x / cap), unless 0
  bool in_double;    // as exact as a result in double

  FUSEDKL_MEMBER double inv_t(int64_t r) const { return !inv_temperature ? 1 : inv_temperature[per_row_temperature ? r : 0]; }
  // all of it in double: a cap bends the difference of two logits by more than one float can say
  FUSEDKL_MEMBER bool exact() const { return in_double || dx == DType::f64 || dy == DType::f64 || cap != 0; }
  FUSEDKL_MEMBER bool counted(int64_t r) const { return !mask || mask[r]; }
  FUSEDKL_MEMBER int64_t pieces() const { return (length + kPiece - 1) / kPiece; }
  FUSEDKL_MEMBER int64_t begin(int segment) const { return static_cast<int64_t>(segment) * cut.size; }
  FUSEDKL_MEMBER int length_of(int segment) const {
    const int64_t left = length - begin(segment);
    return static_cast<int>(left < cut.size ? left : cut.size);
  }
};

// Rows of `values` (and of its gradient) by name; -1: not wanted.
struct ValueRows {
  int64_t forward_kl = -1, reverse_kl = -1, entropy = -1, ref_entropy = -1;
  int64_t logsumexp = -1, ref_logsumexp = -1, logprob = -1, ref_logprob = -1, log_ratio = -1, mean_logprob = -1;
  int64_t family = -1;  // one divergence of family_math.h, at most

  FUSEDKL_MEMBER bool tokens() const { return logprob >= 0 || ref_logprob >= 0 || log_ratio >= 0; }
};

}  // namespace gpu
}  // namespace fusedkl
