// The kernels of one block per row, for every dtype.
#include "cluster.cuh"
#include "elementwise.cuh"
#include "family_rows.cuh"

namespace fusedkl {
namespace gpu {

// The second launch of a forward; see exact.cuh.
static __global__ void __launch_bounds__(kFinishThreads, 2) finish_kernel(FinishArgs a) {
  __shared__ double room[kFinishWarps];
  __shared__ __align__(8) unsigned char result[sizeof(RowState)];
  const Inputs& in = a.in;
  const int64_t r = blockIdx.x;
  const bool counted = in.counted(r);
  RowState* const parts = a.parts + r * in.cut.count;
  for (int i = 0; i < in.cut.count && counted; i++) {
    if (!in.exact() && !is_left_to_exact(parts[i])) continue;
    const RowState s = exact_segment(exact_rows(in, r, in.begin(i)), in.length_of(i), in.inv_t(r), room);
    __syncthreads();  // everyone has seen that this segment was left
    if (threadIdx.x == 0) parts[i] = s;
  }
  double logit_sum = 0;  // a read of its own: nobody else needs the plain mean of a row's logits
  if (a.at.mean_logprob >= 0 && counted) {
    const ExactRows rows = exact_rows(in, r);
    for (int64_t i = static_cast<int64_t>(threadIdx.x); i < in.length; i += static_cast<int64_t>(blockDim.x))
      logit_sum += rows.policy(i);
    logit_sum = block_sum(logit_sum, room);
  }
  RowState& s = *reinterpret_cast<RowState*>(result);
  if (threadIdx.x == 0) {
    s = RowState{};
    if (counted) {
      s = merge(parts, in.cut.count, in.inv_t(r));
      s.whole = 1;
      s.logit_sum = in.inv_t(r) * logit_sum;
      s.tokens = static_cast<double>(in.length);
    }
    a.state[r] = s;
  }
  __syncthreads();
  write_values(a, r, s, counted);
}

// One state per row from the states of slices of its vocabulary; a thread per row. Values are double.
static __global__ void __launch_bounds__(kFinishThreads, 2) merge_kernel(MergeArgs a) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * static_cast<int64_t>(blockDim.x) + static_cast<int64_t>(threadIdx.x);
  if (r >= a.rows) return;
  RowState* const own = a.room + r * a.count;
  for (int64_t i = 0; i < a.count; i++) own[i] = a.parts[i * a.rows + r];
  RowState s = merge(own, static_cast<int>(a.count), a.inv_temperature ? a.inv_temperature[a.per_row_temperature ? r : 0] : 1);
  if (a.count > 1) s.whole = 0;
  a.state[r] = s;
  put_numbers(a.at, settled(s), [&](int64_t row, double v) { a.values[row * a.rows + r] = v; });
}

// The first launch of a backward; see prepare.cuh.
static __global__ void __launch_bounds__(kFinishThreads, 2) prepare_kernel(GradientArgs a) {
  __shared__ double room[kFinishWarps];
  const int64_t r = blockIdx.x;
  if (a.done && a.done[r]) {
    if (threadIdx.x == 0) a.frames[r].fate = kExact;  // nothing left for the sweep
    return;
  }
  RowPlan plan = plan_of(a, r, a.state[r]);
  const double inv_t = a.in.inv_t(r);
  RowState s = a.state[r];
  if (plan.refine) refine_means(a, r, plan, frame_of(plan, s, inv_t), room);
  if (plan.fate == kFamily && refines_slopes(a, s)) refine_slopes(a, r, frame_of(plan, s, inv_t, a.kind.exact.kind), s, room);
  token_gradients(a, plan, r);
  if (threadIdx.x == 0) a.frames[r] = frame_of(plan, s, inv_t, a.kind.exact.kind);
  if (plan.fate != kExact) return;
  __syncthreads();  // the tokens are read, and written by other threads
  exact_gradient(a, plan, r);
}

// The sums of a row in double, the same in every thread.
FUSEDKL_DEVICE FamilySums family_exact_sums(const FamilyArgs& a, int64_t r, const RowState& s, double* room) {
  const ExactRows rows = exact_rows(a.in, r);
  const double inv_t = a.in.inv_t(r);
  FamilySums own;
  for (int64_t i = static_cast<int64_t>(threadIdx.x); i < a.in.length; i += static_cast<int64_t>(blockDim.x))
    own.add(family_sums_at(a.kind.exact, s, rows.policy(i), rows.reference(i), inv_t));
  return {block_sum(own.value, room), block_sum(own.policy_slope, room), block_sum(own.reference_slope, room),
          block_sum(own.apart, room), block_sum(own.excess, room)};
}

// log of sum q^a p^(1-a), the same in every thread.
FUSEDKL_DEVICE double family_log_sum(const FamilyArgs& a, int64_t r, const RowState& s, double* room) {
  const ExactRows rows = exact_rows(a.in, r);
  const double inv_t = a.in.inv_t(r);
  LogSum own;
  for (int64_t i = static_cast<int64_t>(threadIdx.x); i < a.in.length; i += static_cast<int64_t>(blockDim.x))
    own.add(tilted_log2_at(a.kind.exact, s, rows.policy(i), rows.reference(i), inv_t));
  LogSum all;
  all.top = block_max(own.top, room);
  all.sum = block_sum(own.sum > 0 ? own.sum * exp2(own.top - all.top) : 0, room);
  return all.log_of();
}

// Of a whole row, instead of what sweeps in float found.
FUSEDKL_DEVICE RowState state_in_double(const Inputs& in, int64_t r, const RowState& found, double* room) {
  RowState s = exact_segment(exact_rows(in, r), in.length, in.inv_t(r), room);
  s.whole = found.whole;
  s.logit_sum = found.logit_sum;
  s.tokens = found.tokens;
  return s;
}

// Makes a row of what the sweep found, or says that it is to be swept again; see FamilyArgs.
static __global__ void __launch_bounds__(kFinishThreads, 2) family_finish_kernel(FamilyArgs a) {
  __shared__ double room[kFinishWarps];
  const int64_t r = blockIdx.x, pieces = a.in.pieces();
  const bool wanted = family_wants(a, r), in_float = wanted && family_in_float(a, r);
  RowState s = a.state[r];
  __syncthreads();  // everyone has read what one thread writes
  if (!wanted && a.sweep > 0) return;
  bool again = false;
  if (wanted) {
    FamilySums sums;
    for (int64_t i = 0; i < pieces && in_float; i++) sums.add(a.parts[r * pieces + i]);
    const bool exact = !in_float || !is_finite(sums.value) || !is_finite(sums.policy_slope);
    for (int sweeps = 0; exact && (sweeps == 0 || (sweeps < 3 && !a.sums && mend_log_ratio(s, sums))); sweeps++)
      sums = family_exact_sums(a, r, s, room);
    again = !exact && !a.sums && a.sweep < 2 && mend_log_ratio(s, sums);
    const FamilyKind& kind = a.kind.exact.kind;
    const bool apart = hardly_overlap(kind, sums) || wants_log_sum(kind, sums);
    if (apart && !again && !a.sums && !a.in.exact()) {
      s = state_in_double(a.in, r, s, room);
      sums = family_exact_sums(a, r, s, room);
    }
    if (a.sums) {
      const double found[3] = {sums.value, sums.policy_slope, sums.reference_slope};
      if (threadIdx.x < 3) a.sums[3 * r + threadIdx.x] = found[threadIdx.x];
      return;
    }
    if (!again) set_family(s, kind, sums, wants_log_sum(kind, sums) ? family_log_sum(a, r, s, room) : log(sums.policy_slope));
  }
  if (threadIdx.x != 0) return;
  if (a.sums) {
    for (int k = 0; k < 3; k++) a.sums[3 * r + k] = 0;
    return;
  }
  a.again[r] = again;
  if (wanted) a.state[r] = s;
  if (again) return;
  const double value = a.in.counted(r) ? settled(s).divergence : 0;
  if (a.f64) static_cast<double*>(a.values)[r] = value;
  else static_cast<float*>(a.values)[r] = static_cast<float>(value);
}

bool launch_finish(const FinishArgs& args, Stream stream) {
  return launch(finish_kernel, args.in.rows, kFinishThreads, stream, args);
}
bool launch_prepare(const GradientArgs& args, Stream stream) {
  return launch(prepare_kernel, args.in.rows, kFinishThreads, stream, args);
}
bool launch_family_finish(const FamilyArgs& args, Stream stream) {
  return launch(family_finish_kernel, args.in.rows, kFinishThreads, stream, args);
}
ClusterArgs cluster_for(int64_t length, int64_t bytes_per_pair) {
  ClusterArgs c{};
#if defined(FUSEDKL_ON_CPU)
  const char* const limit = std::getenv("SHIM_SHARED_BYTES");  // a test's small device: short rows then take large clusters
  const int64_t shared = limit ? std::atoll(limit) : 227 * 1024;
  const int most = kMostBlocks;
#else
  int device = 0, major = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int most = major >= 9 ? kMostBlocks : 1;
#endif
  for (int blocks = 1; blocks <= most; blocks *= 2) {
    const int64_t slice = ((length + blocks - 1) / blocks + kChunk - 1) / kChunk * kChunk;
    if (kClusterRoom + 128 + slice * bytes_per_pair > shared) continue;
    c.blocks = blocks;
    c.slice = static_cast<int>(slice);
    break;
  }
  return c;
}
bool launch_merge(const MergeArgs& args, Stream stream) {
  return launch(merge_kernel, (args.rows + kFinishThreads - 1) / kFinishThreads, kFinishThreads, stream, args);
}
bool launch_log_softmax(const LogSoftmaxArgs& args, Stream stream) {
  return launch(log_softmax_kernel, args.in.rows, kElementwiseThreads, stream, args);
}
bool launch_log_softmax_backward(const LogSoftmaxArgs& args, Stream stream) {
  return launch(log_softmax_backward_kernel, args.in.rows, kElementwiseThreads, stream, args);
}
bool launch_ordered_sum(const SumArgs& args, Stream stream) {
  return launch(ordered_sum_kernel, 1, kElementwiseThreads, stream, args);
}
bool launch_scale(const ScaleArgs& args, Stream stream) {
  const int64_t blocks = (args.count + 16 * kElementwiseThreads - 1) / (16 * kElementwiseThreads);
  return launch(scale_kernel, blocks < 4096 ? blocks : 4096, kElementwiseThreads, stream, args);
}

}  // namespace gpu
}  // namespace fusedkl
