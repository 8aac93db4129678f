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

// Bytes of shared memory beside the rows: the teams' stretches and parts, the row's frame.
constexpr int kClusterRoom = kTeams * kForwardWarps * kSlots * static_cast<int>(sizeof(Stretch)) +
                             kTeams * static_cast<int>(sizeof(Part)) + static_cast<int>(sizeof(GradientFrame)) + 64;

// Copies a slice to shared memory at the same offset from a 16-byte boundary; asynchronously where whole vectors fit.
template <DType D>
FUSEDKL_DEVICE const char* stage(unsigned char* room, const char* from, int length) {
  const int64_t bytes = static_cast<int64_t>(length) * kSizeOf<D>;
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16);
  char* const to = reinterpret_cast<char*>(room) + skew;
  const int64_t head = bytes < (16 - skew) % 16 ? bytes : (16 - skew) % 16, vectors = (bytes - head) / 16;
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  for (int64_t i = first; i < vectors; i += step) copy_async(to + head + 16 * i, from + head + 16 * i);
  auto element = [&](int64_t at) { memcpy(to + at, from + at, kSizeOf<D>); };
  for (int64_t at = static_cast<int64_t>(first) * kSizeOf<D>; at < head; at += static_cast<int64_t>(step) * kSizeOf<D>)
    element(at);
  for (int64_t at = head + 16 * vectors + static_cast<int64_t>(first) * kSizeOf<D>; at < bytes;
       at += static_cast<int64_t>(step) * kSizeOf<D>)
    element(at);
  return to;
}

template <int MODE, bool PLAIN, DType X, DType Y>
__global__ void __launch_bounds__(kClusterThreads, 1) cluster_kernel(ClusterArgs args) {
  const Inputs& in = args.in;
  const Cluster cluster;
  const int blocks = cluster.size(), rank = cluster.rank();
  const int64_t r = blockIdx.x / blocks;
  const bool counted = in.counted(r);
  const GradientArgs& g = args.gradient;
  unsigned char* const room = dynamic_shared();
  Part* const parts = reinterpret_cast<Part*>(room);  // first: the same place in every block
  Stretch* const slots = reinterpret_cast<Stretch*>(parts + kTeams);
  int* const used = reinterpret_cast<int*>(slots + kTeams * kForwardWarps * kSlots);
  GradientFrame* const frame = reinterpret_cast<GradientFrame*>(used + kTeams * kForwardWarps);
  unsigned char* const rows = room + (kClusterRoom + 15) / 16 * 16;

  // a block's slice, and of it each team's
  const int slice = args.slice, begin = rank * slice;
  const int length = in.length - begin < slice ? static_cast<int>(in.length > begin ? in.length - begin : 0) : slice;
  const char *const from_x = in.x.row(r) + static_cast<int64_t>(begin) * kSizeOf<X>, *const from_y =
                                                                                         in.y.row(r) +
                                                                                         static_cast<int64_t>(begin) * kSizeOf<Y>;
  const char* x = nullptr;
  const char* y = nullptr;
  if (counted) {
    x = stage<X>(rows, from_x, length);
    y = stage<Y>(rows + (static_cast<int64_t>(slice) * kSizeOf<X> + 31) / 16 * 16, from_y, length);
    wait_for_copies();
  }
  __syncthreads();
  const Temperature t(in.inv_t(r));
  const int team = static_cast<int>(threadIdx.x) / kForwardThreads, share = (slice / kTeams + kChunk - 1) / kChunk * kChunk;
  const int at = team * share, own = length - at < share ? (length > at ? length - at : 0) : share;
  {
    const SegmentView<X, Y, false, true> view(x + at * kSizeOf<X>, y + at * kSizeOf<Y>, counted ? own : 0);
    WarpSweep<MODE, X, Y, SegmentView<X, Y, false, true>> sweep(view, t, slots + warp_id() * kSlots);
    sweep.run();
    if (lane_id() == 0) used[warp_id()] = sweep.bad() ? -1 : sweep.used();
  }
  __syncthreads();
  if (warp_id() % kForwardWarps == 0) {
    bool bad = false;
    for (int w = 0; w < kForwardWarps; w++) bad |= used[team * kForwardWarps + w] < 0;
    Part p = gather_stretches<MODE>(slots + team * kForwardWarps * kSlots, used + team * kForwardWarps, t);
    if (bad) p.sums.S = NAN;
    if (lane_id() == 0) parts[team] = p;
  }
  cluster.sync();
  if (warp_id() == 0) {
    const int lane = lane_id();
    Part p = no_part();
    if (lane < blocks * kTeams) p = cluster.peer(parts, lane / kTeams)[lane % kTeams];
    const bool bad = __any_sync(kAllLanes, p.sums.S != p.sums.S) || !(t.inverse < 2e3 && t.inverse > 5e-4);
    RowState s = bad ? left_to_exact() : state_of<MODE, X, Y>(gather<MODE>(bad ? no_part() : p, t), t);
    if (!counted) s = RowState{};
    s.whole = 1;
    if (lane == 0) {
      if (rank == 0) args.parts[r] = s;
      // rows whose gradient needs more than this frame are not done here either
      GradientFrame f{};
      const RowPlan plan = is_left_to_exact(s) ? RowPlan{} : plan_of(g, r, s);
      const bool here = !is_left_to_exact(s) && plan.fate == kSweep && !plan.refine;
      if (here) f = frame_of(plan, s, in.inv_t(r));
      else f.fate = kExact;
      *frame = f;
      if (rank == 0) args.done[r] = here;
    }
  }
  cluster.sync();  // no block may leave, or write its frame's row, while its parts are read
  const GradientFrame f = *frame;
  if (f.fate == kExact) return;
  char* const gx = g.gx.row(r) + static_cast<int64_t>(begin) * kSizeOf<X>;
  if (rank == blocks - 1) fill(g.gx.row(r), X, in.length, g.total_x, 0);
  if (!f.policy) {
    fill(gx, X, 0, length, 0);
    return;
  }
  const SegmentView<X, Y, false, true> view(x, y, length);
  write_gradients<PLAIN, X, Y>(f, view, gx, nullptr);
}

template <DType D>
bool launch_cluster(const ClusterArgs& args, bool plain, Stream stream) {
  const size_t bytes = (kClusterRoom + 15) / 16 * 16 + 2 * ((static_cast<size_t>(args.slice) * kSizeOf<D> + 31) / 16 * 16);
  auto run = [&](auto kernel) {
    return launch(kernel, args.in.rows * args.blocks, kClusterThreads, stream, args, bytes, args.blocks);
  };
  return plain ? run(cluster_kernel<0, true, D, D>) : run(cluster_kernel<kReverse, false, D, D>);
}

}  // namespace gpu
}  // namespace fusedkl
