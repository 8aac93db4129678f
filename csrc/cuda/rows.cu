// The kernels of one block per row, for every dtype.
#include "elementwise.cuh"
#include "prepare.cuh"

namespace fusedkl {
namespace gpu {

bool launch_finish(const FinishArgs& args, Stream stream) {
  return launch(finish_kernel, args.in.rows, kFinishThreads, stream, args);
}
bool launch_prepare(const GradientArgs& args, Stream stream) {
  return launch(prepare_kernel, args.in.rows, kFinishThreads, stream, args);
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
