// The divergences of a second sweep, as the kernels are told of them: a kind's constants in float and in double, and its series.
#pragma once
#include "../cpu/job.h"
#include "../family_terms.h"
#include "args.h"

namespace fusedkl {
namespace gpu {

// One float of a thread, for the formulas of family_terms.h.
struct Real {
  float v;
  FUSEDKL_MEMBER friend Real operator+(Real a, Real b) { return {a.v + b.v}; }
  FUSEDKL_MEMBER friend Real operator-(Real a, Real b) { return {a.v - b.v}; }
  FUSEDKL_MEMBER friend Real operator*(Real a, Real b) { return {a.v * b.v}; }
  FUSEDKL_MEMBER friend Real operator/(Real a, Real b) {
#if defined(__CUDA_ARCH__)
    return {__fdividef(a.v, b.v)};
#else
    return {a.v / b.v};
#endif
  }
};

struct FloatOps {
  using V = Real;
  using M = bool;
  FUSEDKL_MEMBER static V set(double v) { return {static_cast<float>(v)}; }
  FUSEDKL_MEMBER static V select(M m, V yes, V no) { return {m ? yes.v : no.v}; }
  FUSEDKL_MEMBER static M not_above(V a, V b) { return a.v <= b.v; }
  FUSEDKL_MEMBER static V abs(V a) { return {fabsf(a.v)}; }
  FUSEDKL_MEMBER static V fma(V a, V b, V c) { return {fmaf(a.v, b.v, c.v)}; }
  FUSEDKL_MEMBER static V one_minus_exp(V u) { return {-expm1f(-u.v)}; }
  FUSEDKL_MEMBER static V exp_of(V u);  // family.cuh
  FUSEDKL_MEMBER static V h(V z);
};

struct FamilyParameters {
  FamilyConstants<ScalarOps> exact;
  FamilyConstants<FloatOps> fast;
  FamilySeries series;  // of the sums

  FamilyParameters() : FamilyParameters(FamilyKind{}) {}
  explicit FamilyParameters(const FamilyKind& kind) : exact(kind), fast(kind), series{} {
    if (kind.family != Family::none) series = family_sums_series(kind);
  }
};

// The second sweep of rows whose states are known: launch_family_sums, then launch_family_finish; three times, as a row whose
// log-ratio was mended is swept again. The device decides which.
struct FamilyArgs {
  Inputs in;
  FamilyParameters kind;
  RowState* state;     // [rows]
  FamilySums* parts;   // [rows, pieces]
  bool* again;         // [rows]: whether the next sweep has to do with the row
  const bool* valued;  // [rows]: done already; null: none
  int sweep;           // which of the three
  void* values;        // this divergence's row of the values, double if f64
  bool f64;
  double* sums;  // [rows, 3]: the sums themselves, of a slice of a vocabulary, instead of values; null otherwise
};

}  // namespace gpu
}  // namespace fusedkl
