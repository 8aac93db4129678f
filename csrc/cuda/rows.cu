// The kernels of one block per row, for every dtype.
#include "cluster.cuh"
#include "elementwise.cuh"

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
    if (!a.f64 && !is_left_to_exact(parts[i])) continue;
    const RowState s = exact_segment(in.x.row(r) + in.begin(i) * bytes_of(in.dx), in.dx,
                                     in.y.row(r) + in.begin(i) * bytes_of(in.dy), in.dy, in.length_of(i), in.inv_t(r), room);
    __syncthreads();  // everyone has seen that this segment was left
    if (threadIdx.x == 0) parts[i] = s;
  }
  RowState& s = *reinterpret_cast<RowState*>(result);
  if (threadIdx.x == 0) {
    s = RowState{};
    if (counted) {
      s = merge(parts, in.cut.count, in.inv_t(r));
      s.whole = 1;
      // a row without any mass is no distribution
      if (s.policy_log_sum == -INFINITY || s.reference_log_sum == -INFINITY) s = nan_state();
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
  if (s.policy_log_sum == -INFINITY || (a.with_reference && s.reference_log_sum == -INFINITY)) s = nan_state();
  put_numbers(a.at, s, [&](int64_t row, double v) { a.values[row * a.rows + r] = v; });
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
  if (plan.refine) refine_means(a, r, plan, frame_of(plan, a.state[r], inv_t), room);
  token_gradients(a, plan, r);
  if (threadIdx.x == 0) a.frames[r] = frame_of(plan, a.state[r], inv_t);
  if (plan.fate != kExact) return;
  __syncthreads();  // the tokens are read, and written by other threads
  exact_gradient(a, plan, r);
}

bool launch_finish(const FinishArgs& args, Stream stream) {
  return launch(finish_kernel, args.in.rows, kFinishThreads, stream, args);
}
bool launch_prepare(const GradientArgs& args, Stream stream) {
  return launch(prepare_kernel, args.in.rows, kFinishThreads, stream, args);
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
