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
  FUSEDKL_MEMBER static V exp2_of(V u);  // family.cuh
  FUSEDKL_MEMBER static Decay<FloatOps> decay(V u);
  FUSEDKL_MEMBER static V h(V z);
};

// What the second sweep takes chunks of tokens by, unless token by token: with l = log2(p/q), and the sums in `unit`s.
struct ChunkFamily {
  float near = 0;       // |l| up to which the polynomials serve
  FamilySeries series;  // of the sums, in l
  bool direct = false;  // whether mixture.cuh serves
  double unit = 1;
  float beta = 0, rest = 0, policy = 0, apart = 0, slope = 0;  // constants of mixture.cuh

  explicit ChunkFamily(const FamilyKind& kind) : series{} {
    if (kind.family == Family::none) return;
    near = static_cast<float>(kLog2e * series_reach(kind));
    direct = is_balanced(kind);
    const bool two_sided = kind.weight_p != 0;
    if (direct) {
      const double other = 1 - kind.beta;
      unit = two_sided ? kLn2 * kind.beta : kLn2;
      beta = static_cast<float>(kind.beta);
      rest = static_cast<float>(other);
      policy = static_cast<float>(other / kind.beta);
      apart = static_cast<float>(other / kLn2);
      slope = static_cast<float>(two_sided ? kind.beta / kLn2 : kind.beta * kLn2);
    }
    series = family_sums_series(kind);
    double factor = 1 / unit;
    for (int j = 0; j < kSeriesTerms; j++, factor *= kLn2) {
      series.first[j] = static_cast<float>(series.first[j] * factor);
      series.second[j] = static_cast<float>(series.second[j] * factor);
    }
  }
};

struct FamilyParameters {
  FamilyConstants<ScalarOps> exact;
  FamilyConstants<FloatOps> fast;
  ChunkFamily chunk;

  FamilyParameters() : FamilyParameters(FamilyKind{}) {}
  explicit FamilyParameters(const FamilyKind& kind) : exact(kind), fast(kind), chunk(kind) {}
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
