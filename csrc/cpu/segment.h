// From blocks to a segment's RowState: the one-sweep scheme with its tiers and certificates, and the careful two-sweep path that
// takes over where the scheme cannot vouch for its digits. Included once per instruction set, after block_kernels.h.
#pragma once

namespace fusedkl {
namespace {

struct Scale {
  double inv_t;
  float inv_t_f, log2e_t;
  explicit Scale(double inverse_temperature)
      : inv_t(inverse_temperature),
        inv_t_f(static_cast<float>(inverse_temperature)),
        log2e_t(static_cast<float>(kLog2e * inverse_temperature)) {}
};

// log of sum e^((v - max)/T), from the sum of weights 2^(v log2e_t - shift) with a rounded shift
static double log_sum(double weights, float shift, float max, const Scale& t) {
  return log(weights) + (shift - static_cast<double>(max) * t.log2e_t) * kLn2;
}

template <DType D>
static double difference_at(const void* x, const void* y, int64_t i) {
  if constexpr (D == DType::apart) return load_float<DType::f32>(x, i);
  return static_cast<double>(load_float<D>(x, i)) - load_float<D>(y, i);
}

// Entropies from sums relative to a sampled maximum hold while they are not small against their parts; a peaked row takes a sweep
// of its own (entropy_block).
static bool set_entropies(RowState& out, const CentredSums& row, double E, double X) {
  const double log_S = log(row.S), below_q = kLn2 * E / row.S, below_p = kLn2 * X / row.policy_mass();
  out.reference_entropy = log_S - below_q;
  out.entropy = (log_S - below_p) - out.reverse_kl;
  return out.reference_entropy > 0.05 * (fabs(log_S) + fabs(below_q)) &&
         out.entropy > 0.05 * (fabs(log_S) + fabs(below_p) + out.reverse_kl);
}

// What one sweep over a segment came to. Coarse: the rows are so far apart, and differ so little, that differences of their
// logits are rounded by too much; fp32's are not.
enum class Sweep { done, coarse, failed };

// ENTROPY (with REVERSE): both entropies too; `entropies` says whether they hold.
template <DType D, bool REVERSE, bool ENTROPY>
static Sweep one_sweep_segment(const void* x, const void* y, int64_t n, const Scale& t, RowState& out, bool& entropies) {
  using Kernel = BlockSums (*)(const void*, const void*, int64_t, const Frame&);
  // tiers by the block's largest |u|; the second row also skips tokens masked in both rows
  static constexpr Kernel kTier[2][4] = {{poly_block<D, 4, REVERSE, ENTROPY, false>, poly_block<D, 6, REVERSE, ENTROPY, false>,
                                          poly_block<D, 8, REVERSE, ENTROPY, false>, split_block<D, REVERSE, ENTROPY, false>},
                                         {poly_block<D, 4, REVERSE, ENTROPY, true>, poly_block<D, 6, REVERSE, ENTROPY, true>,
                                          poly_block<D, 8, REVERSE, ENTROPY, true>, split_block<D, REVERSE, ENTROPY, true>}};
  static constexpr float kReach[] = {0.5f, 1.f, 2.f, kNear};
  constexpr int kLast = 3;

  const int64_t sample = n < 1024 ? (n < 64 ? n : 64) : n < 8192 ? n / 16 : 512;
  constexpr DType kStored = stored(D);
  float max = D == DType::apart ? 0 : max_block<kStored>(y, sample);  // capped rows are given about their maximum
  if (!(max > -INFINITY)) max = max_block<kStored>(y, n);
  if (!(fabsf(max) * t.log2e_t <= 1e38f)) return Sweep::failed;
  Frame f{};
  f.log2e_t = t.log2e_t;
  f.inv_t = t.inv_t_f;
  f.shift = max * t.log2e_t;

  auto set_centre = [&](double c) { kStored == DType::f32 ? f.set_centre(c) : f.set_coarse_centre(c); };

  // beyond these temperatures the powers of 1/T in the polynomials' coefficients leave fp32
  const int lowest = t.inv_t > 1e3 || t.inv_t < 1e-3 ? 3 : 0;

  // the first difference as origin makes a constant difference exactly 0; the sample's mean makes it a centre
  int64_t first = 0;
  while (first < n && !is_finite(difference_at<D>(x, y, first))) first++;
  if (first == n) return Sweep::failed;
  const double origin = difference_at<D>(x, y, first);
  set_centre(origin);
  Probe probe = probe_block<D>(x, y, sample, f);
  if (probe.reach <= kNear && probe.S > 0) {
    const double mean = probe.A / probe.S;
    if (mean != 0) {
      set_centre(f.centre() + mean / t.inv_t);
      // no second look where the lowest tier is certain of a first one: no |u| grew by more than the centre moved
      const float farthest = probe.reach + static_cast<float>(fabs(mean));
      if (1.5f * farthest <= kReach[lowest]) probe.reach = farthest;
      else probe = probe_block<D>(x, y, sample, f);
    }
  }
  int tier = lowest;
  while (tier < kLast && !(1.5f * probe.reach <= kReach[tier])) tier++;

  CentredSums row;
  double E = 0, X = 0;
  double noise = 0;  // sum of |B| as accumulated: what fp32 rounding is relative to
  int misses = 0, since_probe = 0, patience = 16;
  bool masked = false;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    constexpr int64_t kSize = size_of(D);
    const void *bx = static_cast<const char*>(x) + begin * kSize, *by = static_cast<const char*>(y) + begin * kSize;
    const bool probing = tier > lowest && ++since_probe >= patience;
    const int wanted = probing ? tier - 1 : tier;
    int now = wanted, recentred = 0;
    bool raised = false;
    BlockSums b;
    CentredSums sum;
    for (;;) {
      b = kTier[masked][now](bx, by, size, f);
      // The sampled maximum was too small for this block, or there is a NaN. An exponent is rounded by half an ulp of itself, which
      // a log-probability shows that stands on a heavy token's.
      if (!(b.sums.S <= 0x1p16)) {
        if (raised) return Sweep::failed;
        raised = true;
        const float higher = max_block<kStored>(by, size);
        if (higher > max) {
          const float shift = higher * t.log2e_t;
          const double down = static_cast<double>(f.shift) - static_cast<double>(shift), factor = exp2(down);
          E = factor * (E + down * row.S);
          X = factor * (X + down * row.policy_mass());
          row.scale(factor);
          noise *= factor;
          f.shift = shift;
          max = higher;
        }
        continue;
      }
      const bool finite = fabs(b.sums.A) <= 0x1p100 && fabs(b.sums.B) <= 0x1p100 && fabs(b.sums.C) <= 0x1p100;
      if (!finite || !(b.reach <= kReach[now])) {
        if (b.reach > kNear) return Sweep::failed;
        if (b.reach > kReach[now])
          while (b.reach > kReach[now]) now++;
        else if (!masked) masked = true;  // -inf minus -inf, most likely, and then not the only ones
        else return Sweep::failed;
        continue;
      }
      sum.S = row.S + b.sums.S;
      sum.A = row.A + b.sums.A;
      sum.B = row.B + b.sums.B;
      sum.C = row.C + b.sums.C;
      sum.M = sum.A + sum.B;
      if (recentred < 4 && sum.S > 0 && sum.off_centre()) {
        const double before = f.centre();
        // where hardly a token differs from the origin it is the better centre: the others' u are exactly 0
        set_centre(sum.near_mean(origin - before, t.inv_t) ? origin : before + sum.A / sum.S / t.inv_t);
        const double moved = (f.centre() - before) * t.inv_t;
        if (moved != 0 && fabs(moved) < 80) {
          const double smaller = exp(-moved);
          noise *= smaller;
          X *= smaller;
          if (fabs(moved) < 0.25 && sum.A * sum.A <= sum.B * sum.S) {  // B loses one of its bits at most when it is moved
            sum.recentre_near(moved);
            b.X *= smaller;
            break;
          }
          row.recentre(moved);
          recentred++;
          now = wanted;
          continue;
        }
        set_centre(before);
      }
      break;
    }
    if (probing) {
      since_probe = 0;
      if (now == wanted) tier = wanted, patience = 16;
      else patience = patience < 64 ? 2 * patience : 64;
    } else if (now > wanted) {
      if (++misses >= 2) tier = now, misses = 0, since_probe = 0;
    } else {
      misses = 0;
    }
    row = sum;
    E += b.E;
    X += b.X;
    noise += fabs(b.sums.B);
    // told by the first of several blocks already, most likely
    if (kStored != DType::f32 && begin == 0 && size < n && difference_too_coarse(f.centre() * t.inv_t, row.forward_kl()))
      return Sweep::coarse;
  }

  const double policy = row.policy_mass(), forward = row.forward_kl();
  if (!(row.S > 0)) return Sweep::failed;
  const bool equal_rows = row.A == 0 && row.B == 0;           // every difference is the centre, as this sweep rounds them
  const bool constant = equal_rows && kStored == DType::f32;  // exactly
  if (D != DType::f32 && !constant && difference_too_coarse(f.centre() * t.inv_t, forward)) return Sweep::coarse;
  if (!equal_rows) {
    if (!(noise <= 8 * policy * forward)) return Sweep::failed;
    if constexpr (REVERSE) {
      const double reverse = row.reverse_kl(), kept = fabs(row.M) > 0.5 * row.S ? fabs(row.M + row.C) : 0;
      if (!((fabs(row.C) > kept ? fabs(row.C) : kept) <= 10 * reverse * policy)) return Sweep::failed;
    }
  }
  out = RowState{};
  out.reference_max = max * t.inv_t;
  out.reference_log_sum = log_sum(row.S, f.shift, max, t);
  out.centre = f.centre();
  out.residual = row.log_ratio_about_centre();
  out.policy_max = out.reference_max + f.centre() * t.inv_t;
  out.policy_log_sum = out.reference_log_sum + row.log_ratio_about_centre();
  out.forward_kl = forward;
  out.reverse_kl = REVERSE ? row.reverse_kl() : forward;
  entropies = ENTROPY && set_entropies(out, row, E, X);
  return Sweep::done;
}

static void add_careful(CarefulSums& a, const CarefulSums& b) {
  a.S += b.S;
  a.A += b.A;
  a.B += b.B;
  a.C += b.C;
  a.far_policy += b.far_policy;
  a.far_reference += b.far_reference;
  a.far_policy_u += b.far_policy_u;
  a.far_reference_u += b.far_reference_u;
  a.policy_lacks |= b.policy_lacks;
  a.reference_lacks |= b.reference_lacks;
}

// First sweep: both masses. Second sweep about the true log-ratio, where nothing
// cancels, repeated where that was not known well enough. About three times the one-sweep cost.
template <DType D>
static RowState careful_segment(const void* x, const void* y, int64_t n, const Scale& t) {
  constexpr int64_t kSize = size_of(D);
  auto part = [](const void* base, int64_t i) { return static_cast<const char*>(base) + i * kSize; };
  const float max_x = max_block<D>(x, n), max_y = max_block<D>(y, n);
  if (max_x == INFINITY || max_y == INFINITY) return nan_state();
  const bool has_x = max_x > -INFINITY, has_y = max_y > -INFINITY;
  // x log2(e)/T would leave the range of float: nobody's logits, but a value all the same
  if ((has_x && fabsf(max_x) * t.log2e_t > 1e38f) || (has_y && fabsf(max_y) * t.log2e_t > 1e38f))
    return divergence_f64({x, D}, {y, D}, n, t.inv_t);
  Frame f{};
  f.log2e_t = t.log2e_t;
  f.inv_t = t.inv_t_f;
  f.shift = has_y ? max_y * t.log2e_t : 0;
  f.policy_shift = has_x ? max_x * t.log2e_t : 0;
  int64_t first = 0;
  while (first < n && !is_finite(difference_at<D>(x, y, first))) first++;
  const double origin = first < n ? difference_at<D>(x, y, first) : 0;
  f.set_centre(origin);
  MassSums mass;
  for (int64_t i = 0; i < n; i += kBlock) {
    const MassSums b = mass_block<D>(part(x, i), part(y, i), n - i < kBlock ? n - i : kBlock, f);
    mass.policy += b.policy;
    mass.reference += b.reference;
    mass.difference += b.difference;
  }
  if (mass.policy != mass.policy || mass.reference != mass.reference) return nan_state();

  RowState out{};
  out.policy_max = has_x ? max_x * t.inv_t : 0;
  out.reference_max = has_y ? max_y * t.inv_t : 0;
  out.policy_log_sum = has_x ? log_sum(mass.policy, f.policy_shift, max_x, t) : -INFINITY;
  out.reference_log_sum = has_y ? log_sum(mass.reference, f.shift, max_y, t) : -INFINITY;
  if (!has_x || !has_y) {
    out.residual = has_x ? INFINITY : has_y ? -INFINITY : 0;
    return out;
  }
  const double direct = (out.policy_max - out.reference_max) + (out.policy_log_sum - out.reference_log_sum);
  // the weighted mean is exact for a constant difference; far from it, only the log-ratio centres both directions
  const double mean = origin + mass.difference / mass.reference;
  f.set_centre(fabs(mean * t.inv_t - direct) < 0.5 ? mean : direct / t.inv_t);

  // About a poor centre a small KL is a difference of large sums. Each sweep knows the log-ratio to the accuracy of what is left.
  CarefulSums all;
  CentredSums sums;
  for (int sweeps = 0; sweeps < 4; sweeps++) {
    all = CarefulSums{};
    for (int64_t i = 0; i < n; i += kCarefulBlock)
      add_careful(all, careful_block<D>(part(x, i), part(y, i), n - i < kCarefulBlock ? n - i : kCarefulBlock, f));
    // differences near the limit of float (masks at finfo.min on one side only): their products may have saturated
    if (!(fabs(all.far_policy_u) < 1e30 && fabs(all.far_reference_u) < 1e30)) return divergence_f64({x, D}, {y, D}, n, t.inv_t);
    // policy weights about the centre, on the reference's scale: wx * kappa
    const double kappa = exp2(static_cast<double>(f.policy_shift) - f.shift - f.centre() * static_cast<double>(t.log2e_t));
    sums.S = all.S;
    sums.A = all.A + all.far_reference_u;
    sums.B = all.B + ((kappa * all.far_policy - all.far_reference) - all.far_reference_u);
    sums.C = all.C + all.far_reference + kappa * (all.far_policy_u - all.far_policy);
    sums.M = (all.A + all.B) + (kappa * all.far_policy - all.far_reference);
    out.centre = f.centre();
    out.residual = sums.log_ratio_about_centre();
    if (!is_finite(out.residual)) out.residual = direct - out.centre * t.inv_t;
    const bool forward_holds = all.policy_lacks || fabs(sums.B) <= 4 * sums.S * sums.forward_kl();
    const bool reverse_holds = all.reference_lacks || fabs(sums.C) <= 4 * sums.policy_mass() * sums.reverse_kl();
    if (forward_holds && reverse_holds) break;
    f.set_centre(out.centre + out.residual / t.inv_t);
  }
  out.forward_kl = all.policy_lacks ? INFINITY : sums.forward_kl();
  out.reverse_kl = all.reference_lacks ? INFINITY : sums.reverse_kl();
  return out;
}

template <DType D>
static Sweep in_one_sweep(const void* x, const void* y, int64_t n, double inv_t, bool reverse, bool& entropies, RowState& out) {
  [[maybe_unused]] const FlushSubnormals scope;
  const auto sweep = entropies ? one_sweep_segment<D, true, true>
                     : reverse ? one_sweep_segment<D, true, false>
                               : one_sweep_segment<D, false, false>;
  entropies = false;
  return sweep(x, y, n, Scale(inv_t), out, entropies);
}

// coarse: to be done again with these logits in fp32, whatever is returned.
template <DType D>
static RowState divergence_segment(const void* x, const void* y, int64_t n, double inv_t, bool reverse, bool& entropies,
                                   bool& coarse) {
  RowState out;
  const Sweep sweep = in_one_sweep<D>(x, y, n, inv_t, reverse, entropies, out);
  coarse = sweep == Sweep::coarse;
  if (sweep == Sweep::done) return out;
  if (coarse) return nan_state();
  [[maybe_unused]] const FlushSubnormals scope;
  return careful_segment<D>(x, y, n, Scale(inv_t));
}

// logsumexp of one row, and its entropy where asked. The sums are about the largest logit seen; a block with a larger one is
// done again (about log(blocks) of them), which is cheaper than a pass for the maximum.
template <DType D>
static RowState policy_segment(const void* x, const void* y, int64_t n, double inv_t, bool entropy) {
  constexpr int64_t kSize = size_of(D);
  [[maybe_unused]] const FlushSubnormals scope;
  const Scale t(inv_t);
  RowState out{};
  float max = max_policy<D>(x, y, n < 8192 ? (n + 15) / 16 : 512);
  if (!(max > -INFINITY)) max = max_policy<D>(x, y, n);
  if (max == -INFINITY) {  // no mass; NaNs are not in a maximum
    out.policy_log_sum = -INFINITY;
    for (int64_t i = 0; i < n; i++)
      if (load_float<stored(D)>(x, i) != load_float<stored(D)>(x, i)) return nan_state();
    return out;
  }
  EntropySums row;
  double weights = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const void *const bx = static_cast<const char*>(x) + begin * kSize, *const by = static_cast<const char*>(y) + begin * kSize;
    for (;;) {
      BlockEntropy e;
      WeightSum w{0, 0};
      if (entropy) e = entropy_block<D>(bx, by, size, t.log2e_t, t.inv_t_f, max);
      else w = weight_block<D>(bx, by, size, t.log2e_t, max);
      const float top = entropy ? e.max : w.max;
      if (!(top > max)) {
        weights += w.sum;
        row.ties += e.ties;
        row.rest += e.rest;
        row.gap += e.gap;
        break;
      }
      if (top == INFINITY) return nan_state();
      const double step = (static_cast<double>(top) - max) * t.inv_t;
      weights *= exp(-step);
      row.raise(step);
      max = top;
    }
  }
  if (max == INFINITY || weights != weights || row.rest != row.rest || row.gap != row.gap) return nan_state();
  out.policy_max = max * t.inv_t;
  out.policy_log_sum = entropy ? log_mass(row.ties, row.rest) : log(weights);
  out.entropy = entropy ? entropy_of(row.ties, row.rest, row.gap) : 0;
  return out;
}

template <DType D>
static RowState single_segment(const void* x, int64_t n, double inv_t, bool entropy) {
  return policy_segment<D>(x, x, n, inv_t, entropy);
}

// One side's mass about its own largest logit, where that has more than half of the mass and is above the sampled maximum that
// one_sweep_segment took: a weight of e^10 is known no better than the rounding of its exponent. Whether it was taken again.
static bool sharpen_mass(const float* logits, int64_t n, double inv_t, double& max, double& log_mass) {
  const double above = max_block<DType::f32>(logits, n) * inv_t - max;
  if (!(above > 1 && above > log_mass - 0.7)) return false;
  const RowState own = single_segment<DType::f32>(logits, n, inv_t, false);
  max = own.policy_max;
  log_mass = own.policy_log_sum;
  return true;
}

}  // namespace
}  // namespace fusedkl
