// The streaming forward: one block per segment of a row, one read of both logits.
#pragma once
#include "parts.cuh"
#include "launch.h"

namespace fusedkl {
namespace gpu {

constexpr int kForwardWarps = 4, kForwardThreads = kForwardWarps * kWarp;
constexpr int kSlots = 16;    // stretches of a warp; a segment that needs more is left to the exact kernel
constexpr float kJump = 4.f;  // nats by which a token may exceed the anchor's exponent

// What the registers of a sweep allow (3: with both entropies); 40 KiB of loads in flight per multiprocessor at 5.
template <int MODE, bool ANYWHERE>
constexpr int kBlocksPerSm = ANYWHERE || MODE > (kReverse | kEntropy) ? 3
                             : MODE < kEntropy                        ? 5
                                                                      : 4;

// Four warps work on a segment together; a block is one such team, or several.
FUSEDKL_DEVICE int team_thread() { return static_cast<int>(threadIdx.x) % kForwardThreads; }

// One warp's pass over its share of a segment, which it has in common with the other warps of its team.
template <int MODE, DType X, DType Y, class View>
class WarpSweep {
 public:
  static constexpr int kVectors = kExactDifference<X, Y> ? 1 : 2;  // chunks per lane and tile
  static constexpr bool kTops = (MODE & (kEntropy | kReferenceEntropy)) != 0;

  FUSEDKL_DEVICE WarpSweep(const View& view, const Temperature& t, Stretch* slots) : view_(view), t_(t), slots_(slots) {}

  // Twice where tokens are absent from both rows: the hot loop has no test for them, and its sums are NaN then.
  FUSEDKL_DEVICE void run() {
#pragma unroll 1
    for (int attempt = 0; attempt < 2; attempt++) {
      used_ = 0;
      bad_ = false;
      anchor_ = Anchor{};
      sums_ = LaneSums{};
      int done = 0;
      if (attempt == 0) done = tiles();
      rest(done);
      if (anchor_.exponent > -INFINITY) flush();
      else bad_ = !is_nothing(stretch_of<MODE>(sums_, anchor_));  // tokens, and none that the reference has
      if (!bad_) return;
    }
  }

  FUSEDKL_DEVICE int used() const { return used_; }
  FUSEDKL_DEVICE bool bad() const { return bad_; }

 private:
  FUSEDKL_DEVICE int tiles() {
    int base = 0;
    const int lane = team_thread();
#pragma unroll 1
    for (; base + kForwardThreads * kVectors <= view_.chunks; base += kForwardThreads * kVectors) {
      Chunk<X> cx[kVectors];
      Chunk<Y> cy[kVectors];
      auto fetch = [&](int j, Chunk<X>& x, Chunk<Y>& y) {
        x = view_.policy(base + j * kForwardThreads + lane);
        y = view_.reference(base + j * kForwardThreads + lane);
        return kChunk;
      };
#pragma unroll
      for (int j = 0; j < kVectors; j++) fetch(j, cx[j], cy[j]);
      const bool plain = settle(fetch, kVectors, (MODE & kEntropy) != 0 ? max_of(cx) : 0.f, max_of(cy));
      if (plain) {
        const TileFrame f(t_, anchor_);
#pragma unroll
        for (int j = 0; j < kVectors; j++)
#pragma unroll
          for (int i = 0; i < kChunk / 2; i++)
            add_pair<MODE, X, Y, false>(sums_, f, pair_of(cx[j], i), pair_of(cy[j], i), Liveness{});
      } else {
#pragma unroll 1
        for (int j = 0; j < kVectors; j++) {
          Chunk<X> x;
          Chunk<Y> y;
          checked(x, y, fetch(j, x, y));
        }
      }
    }
    return base;
  }

  // What the tiles left, and the ragged ends: with every token checked.
  FUSEDKL_DEVICE void rest(int base) {
    const int lane = team_thread(), first = lane / kWarp * kWarp;
#pragma unroll 1
    for (bool ragged = false;; base += kForwardThreads) {
      if (base + first >= view_.chunks) {
        if (first >= view_.ragged()) return;
        ragged = true;
      }
      auto fetch = [&](int, Chunk<X>& x, Chunk<Y>& y) {
        x = Chunk<X>{};
        y = Chunk<Y>{};
        if (ragged) {
          if (lane >= view_.ragged()) return 0;
          const int i = view_.ragged_index(lane);
          set_pair(x, 0, {static_cast<float>(load_one<X>(view_.x, i)), 0.f});
          set_pair(y, 0, {static_cast<float>(load_one<Y>(view_.y, i)), 0.f});
          return 1;
        }
        if (base + lane >= view_.chunks) return 0;
        x = view_.policy(base + lane);
        y = view_.reference(base + lane);
        return kChunk;
      };
      Chunk<X> x;
      Chunk<Y> y;
      const int count = fetch(0, x, y);
      float x_top = -INFINITY, y_top = -INFINITY;
#pragma unroll
      for (int i = 0; i < kChunk; i++)
        if (i < count) {
          const F2 px = pair_of(x, i / 2), py = pair_of(y, i / 2);
          x_top = fmaxf(x_top, i % 2 ? px.y : px.x);
          y_top = fmaxf(y_top, i % 2 ? py.y : py.x);
        }
      settle(fetch, 1, x_top, y_top);
      checked(x, y, count);
      if (ragged) return;
    }
  }

  // Sets the anchor for a tile whose largest logits are these. False where its tokens must be checked one by one.
  template <class Fetch>
  FUSEDKL_DEVICE bool settle(const Fetch& fetch, int vectors, float x_top, float y_top) {
    const bool jump = y_top * t_.slope > anchor_.exponent + kJump * static_cast<float>(kLog2e);
    bool record = false;
    if constexpr ((MODE & kEntropy) != 0) record |= x_top >= anchor_.policy_top && x_top > -INFINITY;
    if constexpr ((MODE & kReferenceEntropy) != 0) record |= y_top >= anchor_.reference_top && y_top > -INFINITY;
    if (!__any_sync(kAllLanes, jump || record)) return true;
    if (anchor_.exponent > -INFINITY) flush();
    if (__any_sync(kAllLanes, jump)) anchor_on_tile<X, Y>(anchor_, fetch, vectors, warp_max(y_top), t_);
    if constexpr ((MODE & kEntropy) != 0) anchor_.policy_top = fmaxf(anchor_.policy_top, warp_max(x_top));
    if constexpr ((MODE & kReferenceEntropy) != 0) anchor_.reference_top = fmaxf(anchor_.reference_top, warp_max(y_top));
    return !kTops;
  }

  FUSEDKL_DEVICE void checked(const Chunk<X>& cx, const Chunk<Y>& cy, int count) {
    const TileFrame f(t_, anchor_);
#pragma unroll
    for (int i = 0; i < kChunk / 2; i++) {
      const F2 x = pair_of(cx, i), y = pair_of(cy, i);
      Liveness which;
      auto look = [&](int k, float a, float b) {
        which.live[k] = 2 * i + k < count && !(a == -INFINITY && b == -INFINITY);
        which.policy_tie[k] = which.live[k] && a == anchor_.policy_top;
        which.reference_tie[k] = which.live[k] && b == anchor_.reference_top;
      };
      look(0, x.x, y.x);
      look(1, x.y, y.y);
      add_pair<MODE, X, Y, true>(sums_, f, x, y, which);
    }
  }

  FUSEDKL_DEVICE void flush() {
    const Stretch stretch = stretch_of<MODE>(sums_, anchor_);
    sums_ = LaneSums{};
    bad_ |= used_ == kSlots || !usable(stretch);
    if (bad_) return;
    if (lane_id() == 0) slots_[used_] = stretch;
    used_++;
  }

  const View& view_;
  const Temperature& t_;
  Stretch* const slots_;
  Anchor anchor_;
  LaneSums sums_;
  int used_ = 0;
  bool bad_ = false;
};

// All stretches of a segment, one per lane and warp at a time; the last lane carries what was gathered before.
template <int MODE>
FUSEDKL_DEVICE Part gather_stretches(const Stretch* slots, const int* used, const Temperature& t) {
  constexpr int kLanes = kWarp / kForwardWarps, kTaken = kLanes - 1;
  const int count = used[lane_id() / kLanes], slot = lane_id() % kLanes;
  Part all = no_part();
#pragma unroll 1
  for (int first = 0;; first += kTaken) {
    Part p =
        slot < kTaken && first + slot < count ? part_of<MODE>(slots[lane_id() / kLanes * kSlots + first + slot], t) : no_part();
    if (lane_id() == kWarp - 1) p = all;
    all = gather<MODE>(p, t);
    if (!__any_sync(kAllLanes, first + kTaken < count)) return all;
  }
}

template <int MODE, DType X, DType Y, bool ANYWHERE>
__global__ void __launch_bounds__(kForwardThreads, (kBlocksPerSm<MODE, ANYWHERE>)) forward_kernel(ForwardArgs args) {
  __shared__ __align__(8) unsigned char storage[kForwardWarps * kSlots * sizeof(Stretch)];
  __shared__ int used[kForwardWarps];
  Stretch* const slots = reinterpret_cast<Stretch*>(storage);
  const Inputs& in = args.in;
  const int segment = static_cast<int>(blockIdx.x % in.cut.count);
  const int64_t row = blockIdx.x / in.cut.count;
  if (!in.counted(row)) return;
  const Temperature t(in.inv_t(row));
  const SweepView<X, Y, ANYWHERE> view(in.x.row(row) + in.begin(segment) * kSizeOf<X>,
                                       in.y.row(row) + in.begin(segment) * kSizeOf<Y>, in.length_of(segment));
  WarpSweep<MODE, X, Y, SweepView<X, Y, ANYWHERE>> sweep(view, t, slots + warp_id() * kSlots);
  sweep.run();
  if (lane_id() == 0) used[warp_id()] = sweep.bad() ? -1 : sweep.used();
  __syncthreads();
  if (warp_id() != 0) return;
  bool bad = !(t.inverse < 2e3 && t.inverse > 5e-4);  // powers of 1/T in the coefficients would leave fp32
  for (int w = 0; w < kForwardWarps; w++) bad |= used[w] < 0;
  const RowState state = bad ? left_to_exact() : state_of<MODE, X, Y>(gather_stretches<MODE>(slots, used, t), t);
  if (lane_id() == 0) args.parts[blockIdx.x] = state;  // not from row and segment: they would live through the sweep
}

// The smallest set of sums that has all that was asked for. Mixed dtypes know one set: fewer kernels to build.
template <DType X, DType Y>
bool launch_forward(const ForwardArgs& args, int mode, bool anywhere, Stream stream) {
  const int64_t blocks = args.in.rows * args.in.cut.count;
  auto run = [&](auto kernel) { return launch(kernel, blocks, kForwardThreads, stream, args); };
  constexpr int kAll = kReverse | kEntropy | kReferenceEntropy;
  if constexpr (X == Y) {
    // the same sums at any alignment: another set of them has other last bits
    auto with = [&]<int MODE>() {
      return anywhere ? run(forward_kernel<MODE, X, Y, true>) : run(forward_kernel<MODE, X, Y, false>);
    };
    if (mode == 0) return with.template operator()<0>();
    if (mode == kReverse) return with.template operator()<kReverse>();
    if (mode == kEntropy) return with.template operator()<kEntropy>();
    return with.template operator()<kAll>();
  }
  return run(forward_kernel<kAll, X, Y, true>);
}

}  // namespace gpu
}  // namespace fusedkl
