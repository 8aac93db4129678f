// The second sweep, its gradients and top-k rows, as check.cpp has the others.
#pragma once

namespace {

struct BfRows {
  static constexpr int64_t kRows = 2;
  std::vector<char> x, y, gx, gy;
  Inputs in{};

  BfRows(int64_t length, int skew, std::mt19937& random)
      : x(static_cast<size_t>(2 * (kRows * length + skew))), y(x.size()), gx(x.size()), gy(x.size()) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < kRows * length + skew; i++) {
      const double v = 3 * normal(random) + (i % 97 == 5 ? 9 : 0);
      fusedkl::store_double(x.data(), DType::bf16, i, v);
      fusedkl::store_double(y.data(), DType::bf16, i, v + (i % 31 == 3 ? 3 : 0.3) * normal(random));
    }
    auto layout = [&](RowLayout& l, std::vector<char>& from) {
      l.data = from.data() + 2 * skew;
      l.dims = 1;
      l.size[0] = kRows;
      l.stride[0] = 2 * length;
    };
    layout(in.x, x);
    layout(in.y, y);
    in.dx = in.dy = DType::bf16;
    in.rows = kRows;
    in.length = length;
    in.cut = {1, static_cast<int>(length)};
  }
};

double apart(const char* found, const std::vector<double>& wanted) {
  double error = 0, size = 1e-300;
  for (size_t i = 0; i < wanted.size(); i++) {
    const double v = load_double(found, DType::bf16, static_cast<int64_t>(i));
    error += (v - wanted[i]) * (v - wanted[i]);
    size += wanted[i] * wanted[i];
  }
  return std::sqrt(error / size);
}

// blocks: of a cluster; 0: launches of their own, over vectors (skew 0, lengths of whole vectors) or over any rows
void check_family(int64_t length, const FamilyKind& kind, int skew, int blocks, std::mt19937& random) {
  constexpr int64_t kRows = BfRows::kRows;
  BfRows rows(length, skew, random);
  const bool vectors = skew == 0 && length % kChunk == 0;
  std::vector<RowState> state(kRows);
  std::vector<double> values(kRows);
  const double ones[kRows] = {1, 1};
  char done[kRows] = {}, valued[kRows] = {}, again[kRows] = {};
  GradientArgs g{};
  g.in = rows.in;
  g.gx = g.gy = rows.in.x;
  g.gx.data = rows.gx.data() + 2 * skew;
  g.gy.data = rows.gy.data() + 2 * skew;
  g.total_x = g.total_y = length;
  g.grad = ones;
  g.grad_f64 = true;
  g.grad_stride[0] = kRows;
  g.grad_stride[1] = 1;
  g.at.family = 0;
  g.kind = FamilyParameters(kind);
  if (blocks > 0) {
    ClusterArgs c{};
    c.in = rows.in;
    c.gradient = g;
    c.gradient.gy.data = nullptr;
    c.parts = state.data();
    c.done = reinterpret_cast<bool*>(done);
    c.valued = reinterpret_cast<bool*>(valued);
    c.blocks = blocks;
    c.slice = static_cast<int>(((length + blocks - 1) / blocks + 7) / 8 * 8);
    launch_family_cluster<DType::bf16>(c, nullptr);
    // of a few tokens, one may have nearly all of both masses: a row for the other launches
    for (int64_t r = 0; r < kRows; r++)
      expect((done[r] == 1 && valued[r] == 1) || length < 80, "family done on chip", length, done[r], 1);
  } else {
    for (int64_t r = 0; r < kRows; r++) {
      state[static_cast<size_t>(r)] = divergence_f64({rows.in.x.row(r), DType::bf16}, {rows.in.y.row(r), DType::bf16}, length, 1);
      state[static_cast<size_t>(r)].whole = 1;
    }
    std::vector<FamilySums> parts(static_cast<size_t>(kRows * rows.in.pieces()));
    FamilyArgs a{};
    a.in = rows.in;
    a.kind = g.kind;
    a.state = state.data();
    a.parts = parts.data();
    a.again = reinterpret_cast<bool*>(again);
    a.values = values.data();
    a.f64 = true;
    for (; a.sweep < 3; a.sweep++) {
      vectors ? launch_family_sums<DType::bf16>(a, nullptr) : launch_any_family_sums(a, nullptr);
      launch_family_finish(a, nullptr);
    }
    std::vector<GradientFrame> frames(kRows);
    g.state = state.data();
    g.frames = frames.data();
    launch_prepare(g, nullptr);
    vectors ? launch_family_gradient<DType::bf16>(g, nullptr) : launch_any_family_gradient(g, nullptr);
  }
  for (int64_t r = 0; r < kRows; r++) {
    if (blocks > 0 && !(done[r] && valued[r])) continue;
    GradientJob job;
    job.n = length;
    job.x = rows.in.x.row(r);
    job.y = rows.in.y.row(r);
    job.kind = kind;
    job.state = divergence_f64({job.x, DType::bf16}, {job.y, DType::bf16}, length, 1);
    const FamilySums sums = family_sums_f64(job, DType::bf16, DType::bf16);
    set_family(job.state, kind, sums, log(sums.policy_slope));
    const RowState& found = state[static_cast<size_t>(r)];
    expect(close(found.divergence, job.state.divergence, 1e-5), "family", length, found.divergence, job.state.divergence);
    if (blocks == 0)
      expect(close(values[static_cast<size_t>(r)], found.divergence, 0), "family's value", length, values[static_cast<size_t>(r)],
             found.divergence);
    add_family_gradient(job.gradient, kind, job.state, 1, 1);
    std::vector<double> to_x, to_y;
    char any = 0;
    job.gx = job.gy = &any;
    for (int64_t i = 0; i < length; i++) {
      const auto v = gradients_at(job, load_double(job.x, DType::bf16, i), load_double(job.y, DType::bf16, i));
      to_x.push_back(v.policy);
      to_y.push_back(v.reference);
    }
    if (job.state.divergence < 1e-9) continue;
    const double error = apart(g.gx.row(r), to_x), other = blocks > 0 ? 0 : apart(g.gy.row(r), to_y);
    expect(error <= 4e-3, "family's gradient", length, error, 0);
    expect(other <= 4e-3, "family's gradient to the reference", length, other, 0);
  }
}

void check_topk(int64_t length, int skew, std::mt19937& random) {
  constexpr int64_t kRows = BfRows::kRows, kGiven = 3;
  BfRows rows(length, skew, random);
  // two of them in one word of the marks: threads meet there
  const int64_t ids[kRows * kGiven] = {0, length / 2, -1, length - 1, 5, 9};
  std::vector<RowState> parts(kRows);
  std::vector<TopkState> state(kRows);
  double values[kRows * (kGiven + 1)];
  const double grad[kRows * (kGiven + 1)] = {1, 0, 0, 2, 0.5, 1, 1, 1};
  TopkArgs a{};
  a.in = rows.in;
  a.ids = ids;
  a.per_row = kGiven;
  a.parts = parts.data();
  a.state = state.data();
  a.values = values;
  a.grad = grad;
  a.gx = rows.in.x;
  a.gx.data = rows.gx.data() + 2 * skew;
  const bool vectors = skew == 0 && length % kChunk == 0;
  launch_topk(a, vectors, nullptr);
  launch_topk_gradient(a, vectors, nullptr);
  for (int64_t r = 0; r < kRows; r++) {
    auto logit = [&](int64_t i) { return load_double(rows.in.x.row(r), DType::bf16, i); };
    auto given = [&](int64_t i) {
      for (int64_t k = 0; k < kGiven; k++)
        if (ids[r * kGiven + k] == i) return k;
      return int64_t{-1};
    };
    double total = 0, rest = 0;
    for (int64_t i = 0; i < length; i++) {
      total += std::exp(logit(i));
      if (given(i) < 0) rest += std::exp(logit(i));
    }
    const double* const v = values + r * (kGiven + 1);
    const double* const b = grad + r * (kGiven + 1);
    expect(close(v[kGiven], std::log(rest / total), 1e-5), "the rest", length, v[kGiven], std::log(rest / total));
    double all = b[kGiven];
    for (int64_t k = 0; k < kGiven; k++) {
      const int64_t id = ids[r * kGiven + k];
      const double want = id < 0 ? 0 : logit(id) - std::log(total);
      expect(close(v[k], want, 1e-5), "a given token", length, v[k], want);
      all += b[k];
    }
    std::vector<double> wanted;
    for (int64_t i = 0; i < length; i++) {
      const double p = std::exp(logit(i)) / total;
      wanted.push_back(given(i) < 0 ? b[kGiven] * std::exp(logit(i)) / rest - all * p : b[given(i)] - all * p);
    }
    const double error = apart(a.gx.row(r), wanted);
    expect(error <= 4e-3, "top-k's gradient", length, error, 0);
  }
}

}  // namespace
