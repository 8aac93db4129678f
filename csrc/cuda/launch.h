// Launches, seen from plain C++: the operators call these, each dtype's kernels are compiled on their own.
#pragma once
#include "../topk_math.h"
#include "family_args.h"

#if !defined(FUSEDKL_ON_CPU)
#include <cuda_runtime.h>
#endif

namespace fusedkl {
namespace gpu {

#if defined(FUSEDKL_ON_CPU)
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif

struct ForwardArgs {
  Inputs in;
  RowState* parts;  // [rows, segments]
};

struct FinishArgs {
  Inputs in;
  RowState* parts;  // [rows, segments]; may be `state` where there is one segment
  RowState* state;  // [rows]
  void* values;     // [row_count, rows], double if f64
  bool f64;
  ValueRows at;
  int64_t row_count;
  const int64_t* ids;  // [rows, ids_per_row]; -1: not here
  int64_t ids_per_row;
};

// Constants of a row's gradient sweep.
struct GradientFrame {
  struct Weigh {
    float shift, weight;  // 2^(v slope - shift) * weight = e^(v/T) / mass: what the rounding of the shift took is in the weight
  };
  struct TwoFloats {
    float high, low;
  };
  int fate;                // see gradient.cuh
  bool policy, reference;  // else the whole side is `fill`
  float fill_policy, fill_reference;
  float slope, inv_t, t;
  Weigh p, q;
  TwoFloats ratio;                           // T D: l = ((x - y) - ratio)/T
  TwoFloats above_p, above_q;                // means of x - y: T (l - R) = (x - y) - above_p, T (l + F) = (x - y) - above_q
  float max_x, log_sum_x, max_y, log_sum_y;  // log p = (x - max_x)/T - log_sum_x
  float entropy, ref_entropy;
  float forward, reverse, mass, information, uniform, ref_forward, ref_reverse, ref_mass, ref_information;  // RowGradient
  float divergence, ref_divergence, policy_mean, reference_mean, divergence_value;  // family_gradient_terms
};

struct GradientArgs {
  Inputs in;
  RowLayout gx, gy;          // without data where not wanted
  int64_t total_x, total_y;  // their lengths; beyond `in.length` they are 0
  const RowState* state;
  const void* grad;  // of the values, float or double
  bool grad_f64;
  int64_t grad_stride[2];
  ValueRows at;
  FamilyParameters kind;
  const int64_t* ids;
  int64_t ids_per_row;
  struct GradientFrame* frames;  // [rows], filled by the first launch for the second
  double *tokens, *ref_tokens;   // [rows, ids_per_row] likewise; null: none of that row's logits was asked for
  const bool* done;              // rows whose gradient is written already; may be null
};

// Value and gradient in one launch; see cluster.cuh.
struct ClusterArgs {
  Inputs in;
  GradientArgs gradient;
  RowState* parts;  // [rows]
  bool* done;       // [rows]: whose gradient was written
  bool* valued;     // [rows]: whose second sweep was done; null: there is none
  int blocks;       // of a cluster
  int slice;        // elements of a row in each
};

struct MergeArgs {
  const RowState* parts;   // [count, rows]
  RowState *room, *state;  // [rows, count], [rows]
  int64_t count, rows;
  double* values;
  ValueRows at;
  const double* inv_temperature;
  bool per_row_temperature;
};

struct LogSoftmaxArgs {
  Inputs in;
  RowLayout out, grad;
  DType dtype, grad_dtype;
  const RowState* state;  // forward
};

struct SumArgs {
  const void *values, *weight;  // weight may be null
  DType dtype, weight_dtype;
  int64_t count, stride, weight_stride;
  void* out;  // one number of `dtype`
};

struct ScaleArgs {
  char* data;
  int64_t count;
  DType dtype;
  const void* factor;  // one number
  DType factor_dtype;
};

// Rows as K given tokens and all others; see topk.cuh.
struct TopkArgs {
  Inputs in;
  const int64_t* ids;  // [rows, per_row]; negative: padding
  int64_t per_row;
  RowState* parts;  // [rows, segments]
  TopkState* state;
  double* values;      // [rows, per_row + 1]
  const double* grad;  // of the values
  RowLayout gx;
};

// `mode`: kReverse and so on. `anywhere`: some row does not begin on 16 bytes. False if a launch failed; CUDA's last error says why.
template <DType X, DType Y>
bool launch_forward(const ForwardArgs& args, int mode, bool anywhere, Stream stream);
bool launch_finish(const FinishArgs& args, Stream stream);
// First what needs double: per-row constants, asked-for tokens, rows beyond fp32; then the sweep. Two launches, in this order.
bool launch_prepare(const GradientArgs& args, Stream stream);
// `plain`: the policy's gradient of forward KL alone
template <DType X, DType Y>
bool launch_gradient(const GradientArgs& args, bool plain, bool shifted, Stream stream);

// The second sweep, and its gradient; see FamilyArgs. Both rows of dtype D on 16-byte boundaries, or any rows.
template <DType D>
bool launch_family_sums(const FamilyArgs& args, Stream stream);
template <DType D>
bool launch_family_gradient(const GradientArgs& args, Stream stream);
bool launch_any_family_sums(const FamilyArgs& args, Stream stream);
bool launch_any_family_gradient(const GradientArgs& args, Stream stream);
bool launch_family_finish(const FamilyArgs& args, Stream stream);
template <DType D>
bool launch_family_cluster(const ClusterArgs& args, Stream stream);

// The blocks of a cluster and the slice of each for rows of this length; 0 blocks where this device cannot hold them on chip.
ClusterArgs cluster_for(int64_t length, int64_t bytes_per_pair);
template <DType D>
bool launch_cluster(const ClusterArgs& args, bool plain, Stream stream);
// `vectors`: every row, and its gradient, begins on 16 bytes.
bool launch_topk(const TopkArgs& args, bool vectors, Stream stream);
bool launch_topk_gradient(const TopkArgs& args, bool vectors, Stream stream);
bool launch_merge(const MergeArgs& args, Stream stream);
bool launch_log_softmax(const LogSoftmaxArgs& args, Stream stream);
bool launch_log_softmax_backward(const LogSoftmaxArgs& args, Stream stream);
bool launch_ordered_sum(const SumArgs& args, Stream stream);
bool launch_scale(const ScaleArgs& args, Stream stream);

#if defined(FUSEDKL_DEVICE)  // after device.cuh
template <class Args>
bool launch(void (*kernel)(Args), int64_t blocks, int threads, Stream stream, const Args& args, size_t shared_bytes = 0,
            int cluster = 1) {
  if (blocks == 0) return true;
#if defined(FUSEDKL_ON_CPU)
  (void)stream;
  shim::launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes, cluster, args);
  return true;
#else
  if (shared_bytes > 48 * 1024 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)) != cudaSuccess)
    return false;
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = static_cast<unsigned>(cluster);
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &shape;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args) == cudaSuccess;
#endif
}
#endif

}  // namespace gpu
}  // namespace fusedkl
