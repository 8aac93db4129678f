// The kernels without torch, for the sanitizers and for planted faults: rows of many kinds through forward and backward, held
// against the double-precision path of the CPU. Exits 1 where they differ; the shim and the sanitizers abort on their own.
//   check [longest row]
#include "rows.cu"
#if defined(CHECK_FAMILY)  // minutes of compiling under a sanitizer
#include "family_any.cu"
#include "family_bf16.cu"
#include "topk.cu"
#endif

#include <cpu/job.h>

#include <random>

using namespace fusedkl;
using namespace fusedkl::gpu;

namespace {

int failures = 0;

void expect(bool ok, const char* what, int64_t length, double found, double wanted) {
  if (ok) return;
  std::printf("length %lld: %s is %.9g, not %.9g\n", static_cast<long long>(length), what, found, wanted);
  ++failures;
}

bool close(double found, double wanted, double tolerance) {
  if (wanted != wanted) return found != found;
  if (std::isinf(wanted)) return found == wanted;
  return std::fabs(found - wanted) <= tolerance * std::fabs(wanted) + 1e-15;
}

struct Case {
  const char* name;
  double noise, offset;
  bool masked, one_sided, ascending;
};

template <DType X, DType Y>
void check(int64_t length, const Case& kind, int skew_x, int skew_y, bool shifted, std::mt19937& random) {
  constexpr int64_t kRows = 2;
  // exactly as many bytes as a kernel may touch: what lies beyond belongs to the sanitizer
  auto whole_vectors = [](int64_t bytes) { return static_cast<size_t>((bytes + 15) / 16 * 16); };
  std::vector<char> x(whole_vectors((kRows * length + skew_x) * size_of(X)), 0),
      y(whole_vectors((kRows * length + skew_y) * size_of(Y)), 0);
  std::normal_distribution<double> normal;
  char *const x0 = x.data() + skew_x * size_of(X), *const y0 = y.data() + skew_y * size_of(Y);
  for (int64_t i = 0; i < kRows * length; i++) {
    const bool hole = kind.masked && i % 7 == 3 && length > 7;
    const double v =
        3 * normal(random) + (kind.ascending ? 30.0 * static_cast<double>(i % length) / static_cast<double>(length) : 0);
    fusedkl::store_double(x0, X, i, hole ? -INFINITY : v + kind.offset);
    fusedkl::store_double(y0, Y, i, hole || (kind.one_sided && i == length - 1) ? -INFINITY : v + kind.noise * normal(random));
  }
  Inputs in{};
  in.x.data = x0;
  in.y.data = y0;
  in.x.dims = in.y.dims = 1;
  in.x.size[0] = in.y.size[0] = kRows;
  in.x.stride[0] = length * size_of(X);
  in.y.stride[0] = length * size_of(Y);
  in.dx = X;
  in.dy = Y;
  in.rows = kRows;
  in.length = length;
  const int segment = 4096;
  in.cut = {static_cast<int>((length + segment - 1) / segment), segment};
  std::vector<RowState> parts(static_cast<size_t>(kRows * in.cut.count)), state(kRows);
  std::vector<float> values(4 * kRows);
  ValueRows at;
  at.forward_kl = 0, at.reverse_kl = 1, at.entropy = 2, at.ref_entropy = 3;
  const int64_t blocks = kRows * in.cut.count;
  constexpr int kAll = kReverse | kEntropy | kReferenceEntropy;
  const bool anywhere = skew_x != 0 || skew_y != 0 || length * size_of(X) % 16 != 0 || length * size_of(Y) % 16 != 0;
  launch(anywhere ? forward_kernel<kAll, X, Y, true> : forward_kernel<kAll, X, Y, false>, blocks, kForwardThreads, nullptr,
         ForwardArgs{in, parts.data()});
  launch(finish_kernel, kRows, kFinishThreads, nullptr,
         FinishArgs{in, parts.data(), state.data(), values.data(), false, at, 4, nullptr, 0});
  std::vector<char> gx(static_cast<size_t>(kRows * length * size_of(X))), gy(static_cast<size_t>(kRows * length * size_of(Y)));
  std::vector<GradientFrame> frames(kRows);
  const double ones[4 * kRows] = {1, 1, 0, 0, 0, 0, 0, 0};
  GradientArgs g{};
  g.in = in;
  g.gx = in.x;
  g.gx.data = gx.data();
  g.gy = in.y;
  g.gy.data = gy.data();
  g.total_x = g.total_y = length;
  g.state = state.data();
  g.grad = ones;
  g.grad_f64 = true;
  g.grad_stride[0] = kRows;
  g.grad_stride[1] = 1;
  g.at = at;
  g.frames = frames.data();
  launch(prepare_kernel, kRows, kFinishThreads, nullptr, g);
  const int64_t pieces = kRows * ((length + kPiece - 1) / kPiece);
  launch(shifted ? gradient_kernel<false, X, Y, true> : gradient_kernel<true, X, Y, false>, pieces, kGradientThreads, nullptr, g);
  for (int64_t r = 0; r < kRows; r++) {
    const char *const xr = x0 + r * length * size_of(X), *const yr = y0 + r * length * size_of(Y);
    const RowState want = divergence_f64({xr, X}, {yr, Y}, length, 1);
    const RowState& s = state[static_cast<size_t>(r)];
    expect(close(s.forward_kl, want.forward_kl, 1e-5), kind.name, length, s.forward_kl, want.forward_kl);
    expect(close(s.reverse_kl, want.reverse_kl, 1e-5), "reverse_kl", length, s.reverse_kl, want.reverse_kl);
    expect(close(s.entropy, want.entropy, 1e-5), "entropy", length, s.entropy, want.entropy);
    expect(close(s.reference_entropy, want.reference_entropy, 1e-5), "ref_entropy", length, s.reference_entropy,
           want.reference_entropy);
    RowGradient coefficients;
    coefficients.forward = 1;
    double error = 0, size = 0;
    for (int64_t i = 0; i < length && r == 0; i++) {
      const double a = load_double(xr, X, i), b = load_double(yr, Y, i);
      const double v = a == -INFINITY && b == -INFINITY ? 0 : policy_gradient_at(want, coefficients, a, b, 1);
      const double found = load_double(gx.data(), X, i);
      error += (found - v) * (found - v);
      size += v * v;
    }
    // without a loss scale, each element of a float16 gradient is off by half a subnormal's spacing
    const double lost = X == DType::f16 ? std::ldexp(static_cast<double>(length), -50) : 0;
    const double relative = std::sqrt(std::max(0., error - lost) / (size > 0 ? size : 1));
    expect(relative <= (X == DType::f32 ? 1e-5 : 4e-3) || want.forward_kl < 1e-12, "gradient", length, relative, 0);
  }
}

// Value and gradient in one launch, by clusters of this many blocks.
void check_cluster(int64_t length, int blocks, std::mt19937& random) {
  constexpr int64_t kRows = 2;
  std::vector<char> x(static_cast<size_t>(2 * kRows * length)), y(x.size()), gx(x.size());
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < kRows * length; i++) {
    const double v = 3 * normal(random);
    fusedkl::store_double(x.data(), DType::bf16, i, v);
    fusedkl::store_double(y.data(), DType::bf16, i, v + 0.3 * normal(random));
  }
  std::vector<RowState> state(kRows);
  std::vector<char> done(kRows);
  const double ones[kRows] = {1, 1};
  ClusterArgs c{};
  c.in.x.data = x.data();
  c.in.y.data = y.data();
  c.in.x.dims = c.in.y.dims = 1;
  c.in.x.size[0] = c.in.y.size[0] = kRows;
  c.in.x.stride[0] = c.in.y.stride[0] = 2 * length;
  c.in.dx = c.in.dy = DType::bf16;
  c.in.rows = kRows;
  c.in.length = length;
  c.in.cut = {1, static_cast<int>(length)};
  c.gradient.in = c.in;
  c.gradient.gx = c.in.x;
  c.gradient.gx.data = gx.data();
  c.gradient.total_x = length;
  c.gradient.grad = ones;
  c.gradient.grad_f64 = true;
  c.gradient.grad_stride[0] = kRows;
  c.gradient.grad_stride[1] = 1;
  c.gradient.at.forward_kl = 0;
  c.parts = state.data();
  c.done = reinterpret_cast<bool*>(done.data());
  c.blocks = blocks;
  c.slice = static_cast<int>(((length + blocks - 1) / blocks + 7) / 8 * 8);
  launch_cluster<DType::bf16>(c, true, nullptr);
  for (int64_t r = 0; r < kRows; r++) {
    const char *const xr = x.data() + 2 * r * length, *const yr = y.data() + 2 * r * length;
    const RowState want = divergence_f64({xr, DType::bf16}, {yr, DType::bf16}, length, 1);
    expect(close(state[static_cast<size_t>(r)].forward_kl, want.forward_kl, 1e-5), "cluster", length,
           state[static_cast<size_t>(r)].forward_kl, want.forward_kl);
    expect(done[static_cast<size_t>(r)] == 1, "cluster's row, done in one launch,", length, done[static_cast<size_t>(r)], 1);
    RowGradient coefficients;
    coefficients.forward = 1;
    double error = 0, size = 1e-300;
    for (int64_t i = 0; i < length; i++) {
      const double v =
          policy_gradient_at(want, coefficients, load_double(xr, DType::bf16, i), load_double(yr, DType::bf16, i), 1);
      const double found = load_double(gx.data() + 2 * r * length, DType::bf16, i);
      error += (found - v) * (found - v);
      size += v * v;
    }
    expect(std::sqrt(error / size) <= 4e-3 || length == 1, "cluster's gradient", length, std::sqrt(error / size), 0);
  }
}

}  // namespace

#if defined(CHECK_FAMILY)
#include "check_family.h"
#endif

int main(int argc, char** argv) {
  const int64_t longest = argc > 1 ? std::atoll(argv[1]) : 5000;
  std::mt19937 random(1);
  const Case kinds[] = {{"plain", 0.3, 0, false, false, false},    {"small", 1e-3, 0, false, false, false},
                        {"masked", 0.5, 0, true, false, false},    {"one-sided", 0.5, 0, false, true, false},
                        {"ascending", 0.5, 0, false, false, true}, {"far", 20, 64, false, false, false}};
  for (const int64_t length : {int64_t{1}, int64_t{9}, int64_t{31}, int64_t{257}, int64_t{1024}, int64_t{2085}, longest})
    for (const Case& kind : kinds) {
      if (length > longest) continue;
#if defined(__SANITIZE_THREAD__)  // which takes a millisecond to make a fiber: one length, two kinds
      if (length != 257 || kind.ascending || kind.noise < 0.1 || kind.offset != 0 || kind.one_sided) continue;
#endif
      if (kind.one_sided && length == 1) continue;  // a row without mass
      const int skew = length == 1024 ? 0 : 3;
      check<DType::bf16, DType::bf16>(length, kind, skew, skew, false, random);
      check<DType::bf16, DType::bf16>(length, kind, 1, 6, true, random);
#if defined(CHECK_ALL_DTYPES)
      check<DType::f16, DType::f16>(length, kind, 0, 0, false, random);
      check<DType::f32, DType::f32>(length, kind, 1, 2, true, random);
      check<DType::f32, DType::bf16>(length, kind, 1, 1, true, random);
#endif
    }
#if defined(CHECK_FAMILY)
  const FamilyKind families[] = {FamilyKind::jsd(0.3), FamilyKind::skew_kl(0.1), FamilyKind::tvd(), FamilyKind::renyi(2)};
#if defined(__SANITIZE_THREAD__)
  check_family(1024, families[0], 0, 0, random);
  check_family(1024, families[0], 0, 2, random);
  check_topk(1024, 0, random);
#else
  for (const FamilyKind& family : families)
    for (const int64_t length : {int64_t{9}, int64_t{1024}, int64_t{2085}}) {
      check_family(length, family, 0, 0, random);
      check_family(length, family, 3, 0, random);
#if !defined(SHIM_ONE_BLOCK_AT_A_TIME)
      check_family(length, family, 1, 2, random);
#endif
      check_family(length, family, 0, 1, random);
    }
  for (const int64_t length : {int64_t{80}, int64_t{2085}}) check_topk(length, 0, random), check_topk(length, 3, random);
#endif
#endif
#if defined(__SANITIZE_THREAD__)
  check_cluster(longest, 2, random);
#elif !defined(SHIM_ONE_BLOCK_AT_A_TIME)
  for (const int blocks : {1, 2, 8}) check_cluster(longest < 2000 ? longest : 2003, blocks, random);
#else
  check_cluster(2003, 1, random);
#endif
  if (failures == 0) std::printf("all as expected\n");
  return failures == 0 ? 0 : 1;
}
