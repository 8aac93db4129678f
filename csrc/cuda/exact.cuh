// The second launch of a forward: segments that the fast sums could not vouch for (tokens absent from one row, differences
// beyond fp32, NaN) and all of float64, in double; then the merge of a row's segments, and its values. Which segments need it
// is decided on the device: no host waits for an answer.
#pragma once
#include "parts.cuh"
#include "launch.h"

namespace fusedkl {
namespace gpu {

constexpr int kFinishWarps = 4, kFinishThreads = kFinishWarps * kWarp;

// Sums and maxima over a block, the same in every thread. `room` holds one number per warp.
template <class Combine>
FUSEDKL_DEVICE double block_combine(double v, double* room, const Combine& combine) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o >>= 1) v = combine(v, __shfl_xor_sync(kAllLanes, v, o));
  __syncthreads();  // the room may still be read from the last call
  if (lane_id() == 0) room[warp_id()] = v;
  __syncthreads();
  v = room[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; w++) v = combine(v, room[w]);
  return v;
}
FUSEDKL_DEVICE double block_sum(double v, double* room) {
  return block_combine(v, room, [](double a, double b) { return a + b; });
}
FUSEDKL_DEVICE double block_max(double v, double* room) {
  return block_combine(v, room, [](double a, double b) { return a > b ? a : b; });
}

// The logits of two rows as the exact path reads them.
struct ExactRows {
  const char *x, *y;
  DType dx, dy;
  double cap;

  FUSEDKL_DEVICE double policy(int64_t i) const { return softcapped(load_any(x, dx, i), cap); }
  FUSEDKL_DEVICE double reference(int64_t i) const { return softcapped(load_any(y, dy, i), cap); }
  FUSEDKL_DEVICE double policy_slope(int64_t i) const { return cap == 0 ? 1 : softcap_slope(load_any(x, dx, i), cap); }
  FUSEDKL_DEVICE double reference_slope(int64_t i) const { return cap == 0 ? 1 : softcap_slope(load_any(y, dy, i), cap); }
};
FUSEDKL_DEVICE ExactRows exact_rows(const Inputs& in, int64_t r, int64_t begin = 0) {
  return {in.x.row(r) + begin * bytes_of(in.dx), in.y.row(r) + begin * bytes_of(in.dy), in.dx, in.dy, in.cap};
}

// Three reads; the order of additions is fixed by the block's shape.
FUSEDKL_DEVICE RowState exact_segment(const ExactRows& rows, int64_t n, double inv_t, double* room) {
  const int64_t first = static_cast<int64_t>(threadIdx.x), step = static_cast<int64_t>(blockDim.x);
  double max_x = -INFINITY, max_y = -INFINITY, invalid_x = 0, invalid_y = 0, leader = static_cast<double>(-n);
  for (int64_t i = first; i < n; i += step) {
    const double a = rows.policy(i), b = rows.reference(i);
    if (!(a < INFINITY)) invalid_x = 1;
    if (!(b < INFINITY)) invalid_y = 1;
    max_x = a > max_x ? a : max_x;
    max_y = b > max_y ? b : max_y;
    if (is_finite(a - b) && leader == -n) leader = static_cast<double>(-i);
  }
  max_x = block_max(max_x, room);
  max_y = block_max(max_y, room);
  const bool lost_x = block_max(invalid_x, room) != 0, lost_y = block_max(invalid_y, room) != 0;
  if (lost_x) max_x = -INFINITY;
  if (lost_y) max_y = -INFINITY;
  leader = block_max(leader, room);  // the first token with a finite difference
  const int64_t lead = static_cast<int64_t>(-leader);
  const double origin = leader > -n ? rows.policy(lead) - rows.reference(lead) : 0;

  EntropySums ex, ey;
  double mean = 0;
  for (int64_t i = first; i < n; i += step) {
    const double a = rows.policy(i), b = rows.reference(i), d = a - b;
    if (max_x > -INFINITY) ex.add((max_x - a) * inv_t);
    if (max_y > -INFINITY) ey.add((max_y - b) * inv_t);
    if (is_finite(d) && max_y > -INFINITY) mean += exp((b - max_y) * inv_t) * (d - origin);
  }
  auto whole = [&](EntropySums& e) {
    e.ties = block_sum(e.ties, room);
    e.rest = block_sum(e.rest, room);
    e.gap = block_sum(e.gap, room);
  };
  whole(ex);
  whole(ey);
  RowState s = exact_masses(max_x, ex, max_y, ey, inv_t);
  if (lost_x) lose_policy(s);
  if (lost_y) lose_reference(s);
  if (!(max_x > -INFINITY && max_y > -INFINITY)) return s;
  const double scale = exp(-s.reference_log_sum);
  double centre = origin + block_sum(mean, room) * scale;
  const double direct = (max_x - max_y) * inv_t + (s.policy_log_sum - s.reference_log_sum);
  if (!(fabs(centre * inv_t - direct) < 0.5)) centre = direct / inv_t;
  const double kappa = exp(direct - centre * inv_t - s.policy_log_sum);
  ExactSums all;
  for (int64_t i = first; i < n; i += step) {
    const double a = rows.policy(i), b = rows.reference(i);
    all.add(a, b, exp((b - max_y) * inv_t) * scale, exp((a - max_x) * inv_t) * kappa, centre, inv_t);
  }
  CentredSums sums;
  sums.S = block_sum(all.sums.S, room);
  sums.A = block_sum(all.sums.A, room);
  sums.B = block_sum(all.sums.B, room);
  sums.C = block_sum(all.sums.C, room);
  sums.M = block_sum(all.sums.M, room);
  s.centre = centre;
  s.residual = sums.log_ratio_about_centre();
  s.forward_kl = block_max(all.policy_lacks, room) != 0 ? INFINITY : sums.forward_kl();
  s.reverse_kl = block_max(all.reference_lacks, room) != 0 ? INFINITY : sums.reverse_kl();
  return s;
}

// The numbers of a row that need its state alone.
template <class Put>
FUSEDKL_DEVICE void put_numbers(const ValueRows& at, const RowState& s, const Put& put) {
  if (at.forward_kl >= 0) put(at.forward_kl, s.forward_kl);
  if (at.reverse_kl >= 0) put(at.reverse_kl, s.reverse_kl);
  if (at.entropy >= 0) put(at.entropy, s.entropy);
  if (at.ref_entropy >= 0) put(at.ref_entropy, s.reference_entropy);
  if (at.logsumexp >= 0) put(at.logsumexp, s.policy_max + s.policy_log_sum);
  if (at.ref_logsumexp >= 0) put(at.ref_logsumexp, s.reference_max + s.reference_log_sum);
  if (at.mean_logprob >= 0) put(at.mean_logprob, mean_logprob(s));
  if (at.family >= 0) put(at.family, s.divergence);
}

FUSEDKL_DEVICE void write_values(const FinishArgs& a, int64_t r, const RowState& state, bool counted) {
  const Inputs& in = a.in;
  const RowState s = settled(state);
  const ExactRows rows = exact_rows(in, r);
  auto put = [&](int64_t row, double v) {
    if (a.f64) static_cast<double*>(a.values)[row * in.rows + r] = v;
    else static_cast<float*>(a.values)[row * in.rows + r] = static_cast<float>(v);
  };
  const int64_t first = static_cast<int64_t>(threadIdx.x), step = static_cast<int64_t>(blockDim.x);
  if (!counted) {
    for (int64_t i = first; i < a.row_count; i += step) put(i, 0);
    return;
  }
  if (first == 0) put_numbers(a.at, s, put);
  const double inv_t = in.inv_t(r);
  for (int64_t k = first; k < a.ids_per_row; k += step) {
    const int64_t id = a.ids[r * a.ids_per_row + k];
    const bool here = id >= 0 && id < in.length;
    const double outside = id == -1 ? 0 : NAN;  // an id beyond the vocabulary: the device cannot raise, so its row is NaN
    const double x = here ? rows.policy(id) : 0, y = here ? rows.reference(id) : 0;
    auto put_token = [&](int64_t row, double v) {
      if (row >= 0) put(row + k, here ? v : outside);
    };
    put_token(a.at.logprob, (x * inv_t - s.policy_max) - s.policy_log_sum);
    put_token(a.at.ref_logprob, (y * inv_t - s.reference_max) - s.reference_log_sum);
    put_token(a.at.log_ratio, ((x - y) - s.centre) * inv_t - s.residual);
  }
}

}  // namespace gpu
}  // namespace fusedkl
