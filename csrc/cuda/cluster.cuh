// Value and gradient in one launch, for devices with clusters: the blocks of a cluster hold both rows in their shared memory,
// combine their sums through each other's, and write the gradient from there. A bf16 pair costs 6 bytes of memory traffic: two
// logits read once, one gradient written once. Rows that the fast sums cannot vouch for are left to the ordinary launches.
#pragma once
#include "forward.cuh"
#include "prepare.cuh"

namespace fusedkl {
namespace gpu {

constexpr int kTeams = 4, kClusterThreads = kTeams * kForwardThreads;
constexpr int kMostBlocks = kWarp / kTeams;  // one part per lane, in the end

// What each block has in its dynamic shared memory, at the same place in all of them.
struct ClusterRoom {
  Part parts[kTeams];
  Stretch slots[kTeams * kForwardWarps * kSlots];
  int used[kTeams * kForwardWarps];
  RowState state;
  GradientFrame frame;
  FamilySums sums;
  double sum_room[kClusterThreads / kWarp];
  int decision;
};
constexpr int kClusterRoom = (static_cast<int>(sizeof(ClusterRoom)) + 15) / 16 * 16;

// A block's slice of both rows on 16-byte boundaries of its shared memory.
struct ClusterSlice {
  char *x, *y;
  int64_t begin;
  int length;
};

// Copies a slice to shared memory; asynchronously, in the widest words that its alignment allows.
template <DType D>
FUSEDKL_DEVICE void stage(char* to, const char* from, int length) {
  const int64_t bytes = static_cast<int64_t>(length) * kSizeOf<D>;
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  const uintptr_t address = reinterpret_cast<uintptr_t>(from);
  const int64_t word = address % 16 == 0 ? 16 : address % 4 == 0 ? 4 : 0, words = word == 0 ? 0 : bytes / word;
  if (word == 16)
    for (int64_t i = first; i < words; i += step) copy_async<16>(to + 16 * i, from + 16 * i);
  else if (word == 4)
    for (int64_t i = first; i < words; i += step) copy_async<4>(to + 4 * i, from + 4 * i);
  for (int64_t at = word * words + static_cast<int64_t>(first) * kSizeOf<D>; at < bytes;
       at += static_cast<int64_t>(step) * kSizeOf<D>)
    memcpy(to + at, from + at, kSizeOf<D>);
}

// The other way, element by element: a gradient that does not lie on 16-byte boundaries.
template <DType D>
FUSEDKL_DEVICE void unstage(char* to, const char* from, int length) {
  for (int64_t i = static_cast<int64_t>(threadIdx.x); i < length; i += static_cast<int64_t>(blockDim.x))
    memcpy(to + i * kSizeOf<D>, from + i * kSizeOf<D>, kSizeOf<D>);
}

template <DType D>
FUSEDKL_DEVICE ClusterSlice staged_slice(const ClusterArgs& args, int64_t r, int rank, bool counted) {
  const Inputs& in = args.in;
  ClusterSlice s;
  s.begin = static_cast<int64_t>(rank) * args.slice;
  s.length = in.length - s.begin < args.slice ? static_cast<int>(in.length > s.begin ? in.length - s.begin : 0) : args.slice;
  s.x = reinterpret_cast<char*>(dynamic_shared()) + kClusterRoom;
  s.y = s.x + static_cast<int64_t>(args.slice) * kSizeOf<D>;
  if (counted) {
    stage<D>(s.x, in.x.row(r) + s.begin * kSizeOf<D>, s.length);
    stage<D>(s.y, in.y.row(r) + s.begin * kSizeOf<D>, s.length);
    wait_for_copies();
  }
  __syncthreads();
  return s;
}

// The row's state, made by every block from all blocks' parts; one thread of each hands it to `then`. All is in place after it.
template <int MODE, DType D, class Then>
FUSEDKL_DEVICE void cluster_state(const ClusterArgs& args, const Cluster& cluster, ClusterRoom* room, const ClusterSlice& slice,
                                  int64_t r, bool counted, const Then& then) {
  const Temperature t(args.in.inv_t(r));
  const int team = static_cast<int>(threadIdx.x) / kForwardThreads, share = (args.slice / kTeams + kChunk - 1) / kChunk * kChunk,
            at = team * share, own = slice.length - at < share ? (slice.length > at ? slice.length - at : 0) : share;
  {
    const SegmentView<D, D, false, true> view(slice.x + at * kSizeOf<D>, slice.y + at * kSizeOf<D>, counted ? own : 0);
    WarpSweep<MODE, D, D, SegmentView<D, D, false, true>> sweep(view, t, room->slots + warp_id() * kSlots);
    sweep.run();
    if (lane_id() == 0) room->used[warp_id()] = sweep.bad() ? -1 : sweep.used();
  }
  __syncthreads();
  if (warp_id() % kForwardWarps == 0) {
    bool bad = false;
    for (int w = 0; w < kForwardWarps; w++) bad |= room->used[team * kForwardWarps + w] < 0;
    Part p = gather_stretches<MODE>(room->slots + team * kForwardWarps * kSlots, room->used + team * kForwardWarps, t);
    if (bad) p.sums.S = NAN;
    if (lane_id() == 0) room->parts[team] = p;
  }
  cluster.sync();
  if (warp_id() == 0) {
    const int lane = lane_id();
    Part p = no_part();
    if (lane < cluster.size() * kTeams) p = cluster.peer(room, lane / kTeams)->parts[lane % kTeams];
    const bool bad = __any_sync(kAllLanes, p.sums.S != p.sums.S) || !(t.inverse < 2e3 && t.inverse > 5e-4);
    RowState s = bad ? left_to_exact() : state_of<MODE, D, D>(gather<MODE>(bad ? no_part() : p, t), t);
    if (!counted) s = RowState{};
    s.whole = 1;
    if (lane == 0) then(s);
  }
  cluster.sync();  // no block may leave, or write what it has for the next, while its parts are read
}

// Of the policy, from its frame: zeros for the logits that do not exist, then `write(to)`, which may write where the policy's
// logits are staged if the gradient itself is not aligned for it.
template <DType D, class Write>
FUSEDKL_DEVICE void cluster_gradient(const ClusterArgs& args, int64_t r, bool last, const ClusterSlice& slice,
                                     const GradientFrame& f, const Write& write) {
  const GradientArgs& g = args.gradient;
  char* const gx = g.gx.row(r) + slice.begin * kSizeOf<D>;
  if (last) fill(g.gx.row(r), D, args.in.length, g.total_x, 0);
  if (!f.policy) {
    fill(gx, D, 0, slice.length, f.fill_policy);
    return;
  }
  const bool direct = reinterpret_cast<uintptr_t>(gx) % 16 == 0;
  write(direct ? gx : slice.x);
  if (direct) return;
  __syncthreads();
  unstage<D>(gx, slice.x, slice.length);
}

template <int MODE, bool PLAIN, DType D>
__global__ void __launch_bounds__(kClusterThreads, 1) cluster_kernel(ClusterArgs args) {
  const Inputs& in = args.in;
  const Cluster cluster;
  const int rank = cluster.rank();
  const int64_t r = blockIdx.x / cluster.size();
  const bool counted = in.counted(r);
  ClusterRoom* const room = reinterpret_cast<ClusterRoom*>(dynamic_shared());
  const ClusterSlice slice = staged_slice<D>(args, r, rank, counted);
  cluster_state<MODE, D>(args, cluster, room, slice, r, counted, [&](const RowState& s) {
    if (rank == 0) args.parts[r] = s;
    // rows whose gradient needs more than this frame are not done here either
    const RowPlan plan = is_left_to_exact(s) ? RowPlan{} : plan_of(args.gradient, r, s);
    const bool here = !is_left_to_exact(s) && plan.fate == kSweep && !plan.refine;
    room->frame = here ? frame_of(plan, s, in.inv_t(r)) : GradientFrame{};
    room->decision = here;
    if (rank == 0) args.done[r] = here;
  });
  if (!room->decision) return;
  const GradientFrame f = room->frame;
  cluster_gradient<D>(args, r, rank == cluster.size() - 1, slice, f, [&](char* to) {
    write_gradients<PLAIN, D, D>(f, SegmentView<D, D, false, true>(slice.x, slice.y, slice.length), to, nullptr);
  });
}

// Shared memory of a block: the rows' slices are whole chunks.
template <DType D, class Kernel>
bool launch_on_chip(const ClusterArgs& args, Kernel kernel, Stream stream) {
  const size_t bytes = kClusterRoom + 2 * static_cast<size_t>(args.slice) * kSizeOf<D>;
  return launch(kernel, args.in.rows * args.blocks, kClusterThreads, stream, args, bytes, args.blocks);
}

template <DType D>
bool launch_cluster(const ClusterArgs& args, bool plain, Stream stream) {
  return plain ? launch_on_chip<D>(args, cluster_kernel<0, true, D>, stream)
               : launch_on_chip<D>(args, cluster_kernel<kReverse, false, D>, stream);
}

}  // namespace gpu
}  // namespace fusedkl
