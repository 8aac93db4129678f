// The second sweep and its gradient over rows that a cluster holds on chip: a divergence costs one read of both rows, with its
// gradient one write more.
#pragma once
#include "cluster.cuh"
#include "family_rows.cuh"

namespace fusedkl {
namespace gpu {

// What a block decides after the sums; the same in all blocks of a cluster.
constexpr int kLeft = 0, kAgain = 1, kValued = 2, kWithGradient = 3;

template <Family F, DType D>
__global__ void __launch_bounds__(kClusterThreads, 1) family_cluster_kernel(ClusterArgs args) {
  const Inputs& in = args.in;
  const GradientArgs& g = args.gradient;
  const Cluster cluster;
  const int rank = cluster.rank();
  const int64_t r = blockIdx.x / cluster.size();
  const bool counted = in.counted(r);
  const double inv_t = in.inv_t(r);
  ClusterRoom* const room = reinterpret_cast<ClusterRoom*>(dynamic_shared());
  const ClusterSlice slice = staged_slice<D>(args, r, rank, counted);
  cluster_state<kEntropy, D>(args, cluster, room, slice, r, counted, [&](const RowState& s) {
    room->state = s;
    room->frame = frame_of(RowPlan{}, s, inv_t);
    const bool left = is_left_to_exact(s) || beyond_sweeps(in, s, inv_t) || !is_finite(s.residual);
    room->decision = !counted ? kValued : left ? kLeft : kAgain;
  });
  const VectorRows<D, true> rows{slice.x, slice.y, slice.length};
  for (int sweep = 0; room->decision == kAgain; sweep++) {
    const FamilySums own = family_block_sums<F>(g.kind, room->frame, rows, may_want_mending(room->state), room->sum_room);
    if (threadIdx.x == 0) room->sums = own;
    cluster.sync();
    if (threadIdx.x == 0) {
      FamilySums all;
      for (int b = 0; b < cluster.size(); b++) all.add(cluster.peer(room, b)->sums);
      RowState& s = room->state;
      room->decision = kLeft;
      if (is_finite(all.value) && is_finite(all.policy_slope)) {
        room->decision = sweep < 2 && mend_log_ratio(s, all) ? kAgain : kValued;
        if constexpr (F == Family::tilted)
          if (room->decision == kValued && (hardly_overlap(g.kind.exact.kind, all) || wants_log_sum(g.kind.exact.kind, all)))
            room->decision = kLeft;
        if (room->decision == kValued) set_family(s, g.kind.exact.kind, all, log(all.policy_slope));
        room->frame = frame_of(RowPlan{}, s, inv_t);
      }
    }
    cluster.sync();  // before the sums are written again
  }
  __syncthreads();  // everyone has read the last decision
  if (threadIdx.x == 0) {
    const RowState s = room->state;
    if (room->decision == kValued && g.gx.data) {
      const RowPlan plan = plan_of(g, r, s);
      if (plan.fate == kFamily ? !refines_slopes(g, s) : plan.fate == kSweep && !plan.policy) {
        room->decision = kWithGradient;
        room->frame = frame_of(plan, s, inv_t, g.kind.exact.kind);
      }
    }
    if (rank == 0) {
      args.parts[r] = s;
      args.valued[r] = room->decision >= kValued;
      if (g.gx.data) args.done[r] = room->decision == kWithGradient;
    }
  }
  __syncthreads();
  if (room->decision != kWithGradient) return;
  const GradientFrame f = room->frame;
  cluster_gradient<D>(args, r, rank == cluster.size() - 1, slice, f,
                      [&](char* to) { family_gradients<F>(g.kind, f, rows, to, nullptr); });
}

template <DType D>
bool launch_family_cluster(const ClusterArgs& args, Stream stream) {
  return family_switch(args.gradient.kind.exact.kind,
                       [&](auto f) { return launch_on_chip<D>(args, family_cluster_kernel<decltype(f)::value, D>, stream); });
}

}  // namespace gpu
}  // namespace fusedkl
