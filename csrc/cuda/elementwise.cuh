// The kernels without a sweep of their own: log_softmax and its gradient, the ordered sum, the scaling of a gradient.
#pragma once
#include "exact.cuh"

namespace fusedkl {
namespace gpu {

constexpr int kElementwiseThreads = 256;

static __global__ void __launch_bounds__(kElementwiseThreads) log_softmax_kernel(LogSoftmaxArgs a) {
  const int64_t r = blockIdx.x;
  const RowState s = a.state[r];
  const char* const x = a.in.x.row(r);
  char* const out = a.out.row(r);
  for (int64_t i = static_cast<int64_t>(threadIdx.x); i < a.in.length; i += static_cast<int64_t>(blockDim.x))
    store_any(out, a.dtype, i, (load_any(x, a.in.dx, i) - s.policy_max) - s.policy_log_sum);
}

// grad - softmax * sum(grad); in.x is the output of the forward
static __global__ void __launch_bounds__(kElementwiseThreads) log_softmax_backward_kernel(LogSoftmaxArgs a) {
  __shared__ double room[kElementwiseThreads / kWarp];
  const int64_t r = blockIdx.x;
  const char *const output = a.in.x.row(r), *const grad = a.grad.row(r);
  char* const out = a.out.row(r);
  const int64_t first = static_cast<int64_t>(threadIdx.x), step = static_cast<int64_t>(blockDim.x);
  double total = 0;
  for (int64_t i = first; i < a.in.length; i += step) total += load_any(grad, a.grad_dtype, i);
  total = block_sum(total, room);
  for (int64_t i = first; i < a.in.length; i += step)
    store_any(out, a.dtype, i, load_any(grad, a.grad_dtype, i) - exp(load_any(output, a.in.dx, i)) * total);
}

// One block, each thread its own stride of the values: the same order whatever else the device does.
static __global__ void __launch_bounds__(kElementwiseThreads) ordered_sum_kernel(SumArgs a) {
  __shared__ double room[kElementwiseThreads / kWarp];
  double total = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x); i < a.count; i += static_cast<int64_t>(blockDim.x)) {
    const double v = load_any(static_cast<const char*>(a.values), a.dtype, i * a.stride);
    total += a.weight ? v * load_any(static_cast<const char*>(a.weight), a.weight_dtype, i * a.weight_stride) : v;
  }
  total = block_sum(total, room);
  if (threadIdx.x == 0) store_any(static_cast<char*>(a.out), a.dtype, 0, total);
}

// Nothing is touched where the factor is 1, and 0 silences even NaN: a factor of 0, and the gradient of a masked row.
static __global__ void __launch_bounds__(kElementwiseThreads) scale_kernel(ScaleArgs a) {
  const double factor = load_any(static_cast<const char*>(a.factor), a.factor_dtype, 0);
  if (factor == 1) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * static_cast<int64_t>(blockDim.x);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * static_cast<int64_t>(blockDim.x) + static_cast<int64_t>(threadIdx.x);
       i < a.count; i += step) {
    const double gradient = load_any(a.data, a.dtype, i);
    store_any(a.data, a.dtype, i, factor == 0 || gradient == 0 ? 0 : gradient * factor);
  }
}

}  // namespace gpu
}  // namespace fusedkl
