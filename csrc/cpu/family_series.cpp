// Taylor series of a divergence's terms in l = log(p/q) about 0, per unit of q:
// what most tokens of two rows that are close take, instead of logarithms. They
// come out of the formulas of family_terms.h themselves, evaluated on truncated
// series.
#include "../family_terms.h"
#include "job.h"

namespace fusedkl {
namespace {

struct Series {
  double c[kSeriesTerms] = {};

  static Series constant(double v) {
    Series s;
    s.c[0] = v;
    return s;
  }
};

Series operator+(const Series& a, const Series& b) {
  Series s;
  for (int j = 0; j < kSeriesTerms; j++) s.c[j] = a.c[j] + b.c[j];
  return s;
}
Series operator-(const Series& a, const Series& b) {
  Series s;
  for (int j = 0; j < kSeriesTerms; j++) s.c[j] = a.c[j] - b.c[j];
  return s;
}
Series operator*(const Series& a, const Series& b) {
  Series s;
  for (int i = 0; i < kSeriesTerms; i++)
    for (int j = 0; i + j < kSeriesTerms; j++) s.c[i + j] += a.c[i] * b.c[j];
  return s;
}
Series operator/(const Series& a, const Series& b) {
  Series s;
  for (int i = 0; i < kSeriesTerms; i++) {
    double rest = a.c[i];
    for (int j = 1; j <= i; j++) rest -= b.c[j] * s.c[i - j];
    s.c[i] = rest / b.c[0];
  }
  return s;
}

// e^u and log(1 + z), z(0) = 0, by their differential equations
Series exp_series(const Series& u) {
  Series s = Series::constant(exp(u.c[0]));
  for (int i = 1; i < kSeriesTerms; i++) {
    for (int j = 1; j <= i; j++) s.c[i] += j * u.c[j] * s.c[i - j];
    s.c[i] /= i;
  }
  return s;
}
Series log1p_series(const Series& z) {
  Series s;
  for (int i = 1; i < kSeriesTerms; i++) {
    s.c[i] = i * z.c[i];
    for (int j = 1; j < i; j++) s.c[i] -= j * s.c[j] * z.c[i - j];
    s.c[i] /= i;
  }
  return s;
}

struct SeriesOps {
  using V = Series;
  using M = bool;
  static V set(double v) { return Series::constant(v); }
  static V select(M m, const V& yes, const V& no) { return m ? yes : no; }
  static M not_above(const V&, const V&) { return true; }
  static V abs(const V& a) { return a; }
  static V fma(const V& a, const V& b, const V& c) { return a * b + c; }
  static V h(const V& z) { return z - log1p_series(z); }
  static V one_minus_exp(const V& u) { return set(1) - exp_of(set(0) - u); }
  static V exp_of(const V& u) { return exp_series(u); }
};

FamilyToken<SeriesOps> series_token() {
  Series l;
  l.c[1] = 1;
  const Series rest = exp_series(l), one = Series::constant(1);
  return {false, l, Series() - l, one - rest, rest, one};
}

void copy(const Series& from, float* to, double factor) {
  for (int j = 0; j < kSeriesTerms; j++) to[j] = static_cast<float>(factor * from.c[j]);
}

}  // namespace

FamilySeries family_sums_series(const FamilyKind& kind) {
  const FamilyConstants<SeriesOps> c(kind);
  const auto terms = family_switch(kind, [&](auto f) { return family_terms<decltype(f)::value, SeriesOps>(c, series_token()); });
  FamilySeries out;
  copy(terms.value, out.first, 1);
  copy(terms.policy, out.second, 1);
  // they begin with l^2, whatever rounding left
  out.first[0] = out.first[1] = 0;
  if (kind.family == Family::mixture) out.second[0] = out.second[1] = 0;
  return out;
}

FamilySeries family_gradient_series(const GradientJob& job) {
  const FamilyConstants<SeriesOps> c(job.kind);
  const RowState& s = job.state;
  const RowGradient& g = job.gradient;
  auto constant = [](double v) { return Series::constant(v); };
  auto terms = family_switch(job.kind, [&](auto f) {
    return family_gradient_terms<decltype(f)::value, SeriesOps>(
        c, series_token(), constant(s.policy_slope), constant(s.reference_slope), constant(gradient_value(job.kind, s)));
  });
  const Series policy = constant(g.divergence) * terms.policy + constant(g.mass) * series_token().rest;
  FamilySeries out;
  copy(policy, out.first, 1);
  copy(terms.reference, out.second, g.ref_divergence);
  return out;
}

}  // namespace fusedkl
