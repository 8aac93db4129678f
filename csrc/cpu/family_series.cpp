// Polynomials in l = log(p/q) for a divergence's terms, per unit of q: what most
// tokens of two rows that are close take, instead of logarithms. They are Taylor
// series, which come out of the formulas of family_terms.h themselves, evaluated
// on truncated series, and then made shorter.
#include "../family_terms.h"
#include "job.h"

namespace fusedkl {
namespace {

// Taylor series in l about 0: the nearest singularity is at a distance of pi or
// more, so at |l| = 1 the terms left out are below 1e-8.
constexpr int kTaylorTerms = 18;

struct Series {
  double c[kTaylorTerms] = {};

  static Series constant(double v) {
    Series s;
    s.c[0] = v;
    return s;
  }
};

Series operator+(const Series& a, const Series& b) {
  Series s;
  for (int j = 0; j < kTaylorTerms; j++) s.c[j] = a.c[j] + b.c[j];
  return s;
}
Series operator-(const Series& a, const Series& b) {
  Series s;
  for (int j = 0; j < kTaylorTerms; j++) s.c[j] = a.c[j] - b.c[j];
  return s;
}
Series operator*(const Series& a, const Series& b) {
  Series s;
  for (int i = 0; i < kTaylorTerms; i++)
    for (int j = 0; i + j < kTaylorTerms; j++) s.c[i + j] += a.c[i] * b.c[j];
  return s;
}
Series operator/(const Series& a, const Series& b) {
  Series s;
  for (int i = 0; i < kTaylorTerms; i++) {
    double rest = a.c[i];
    for (int j = 1; j <= i; j++) rest -= b.c[j] * s.c[i - j];
    s.c[i] = rest / b.c[0];
  }
  return s;
}

// e^u and log(1 + z), z(0) = 0, by their differential equations
Series exp_series(const Series& u) {
  Series s = Series::constant(exp(u.c[0]));
  for (int i = 1; i < kTaylorTerms; i++) {
    for (int j = 1; j <= i; j++) s.c[i] += j * u.c[j] * s.c[i - j];
    s.c[i] /= i;
  }
  return s;
}
Series log1p_series(const Series& z) {
  Series s;
  for (int i = 1; i < kTaylorTerms; i++) {
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
  static V one_minus_exp(const V& u) { return set(1) - exp_series(set(0) - u); }
  static Decay<SeriesOps> decay(const V& u) { return {one_minus_exp(u), exp_series(set(0) - u)}; }
  static V exp2_of(const V& u) { return exp_series(set(kLn2) * u); }
};

FamilyToken<SeriesOps> series_token() {
  Series l;
  l.c[1] = 1;
  const Series rest = exp_series(l), one = Series::constant(1);
  return {false, l, Series() - l, one - rest, rest, one, Series(), one};
}

// The polynomial of so few terms that is nearest to it up to |l| = reach: from the
// highest power down, each is replaced by what the Chebyshev polynomial of its
// degree has besides, which nowhere is far from it. The first two coefficients
// stay: what vanishes with l, or with its square, is right relative to that.
template <int SIZE>
void shorten(const Series& from, int terms, double reach, double factor, float (&to)[SIZE]) {
  constexpr int kKept = 2;
  Series s = from;
  for (int n = kTaylorTerms - 1 - kKept; n >= terms - kKept; n--) {
    double c = s.c[n + kKept];
    for (int k = n; k >= 2; k -= 2) {
      c *= -reach * reach * k * (k - 1) / ((n - k + 2) * (n + k - 2));
      s.c[k - 2 + kKept] -= c;
    }
  }
  for (int j = 0; j < SIZE; j++) to[j] = j < terms ? static_cast<float>(factor * s.c[j]) : 0;
}

}  // namespace

FamilySeries family_sums_series(const FamilyKind& kind) {
  const FamilyConstants<SeriesOps> c(kind);
  auto terms = family_switch(kind, [&](auto f) { return family_terms<decltype(f)::value, SeriesOps>(c, series_token()); });
  FamilySeries out;
  const double reach = series_reach(kind);
  // they begin with l^2, whatever rounding left
  terms.value.c[0] = terms.value.c[1] = 0;
  if (kind.family == Family::mixture) terms.policy.c[0] = terms.policy.c[1] = 0;
  shorten(terms.value, kSeriesTerms, reach, 1, out.first);
  shorten(terms.policy, kSeriesTerms, reach, 1, out.second);
  shorten(terms.value, kCloseTerms, reach / 4, 1, out.close_first);
  shorten(terms.policy, kCloseTerms, reach / 4, 1, out.close_second);
  return out;
}

FamilySeries family_gradient_series(const GradientJob& job, bool coarse) {
  const FamilyConstants<SeriesOps> c(job.kind);
  const RowState& s = job.state;
  const RowGradient& g = job.gradient;
  auto constant = [](double v) { return Series::constant(v); };
  auto slopes = family_switch(job.kind, [&](auto f) {
    return family_gradient_terms<decltype(f)::value, SeriesOps>(
        c, series_token(), constant(s.policy_slope), constant(s.reference_slope), constant(gradient_value(job.kind, s)));
  });
  const Series policy = constant(g.divergence) * slopes.policy + constant(g.mass) * series_token().rest;
  FamilySeries out;
  const double reach = series_reach(job.kind);
  const int terms = coarse ? kCoarseTerms : kSeriesTerms, close = coarse ? kCoarseCloseTerms : kCloseTerms;
  shorten(policy, terms, reach, 1, out.first);
  shorten(slopes.reference, terms, reach, g.ref_divergence, out.second);
  shorten(policy, close, reach / 4, 1, out.close_first);
  shorten(slopes.reference, close, reach / 4, g.ref_divergence, out.close_second);
  return out;
}

}  // namespace fusedkl
