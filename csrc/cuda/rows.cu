// The kernels of one block per row, for every dtype.
#include "prepare.cuh"

namespace fusedkl {
namespace gpu {

bool launch_finish(const FinishArgs& args, Stream stream) {
  return launch(finish_kernel, args.in.rows, kFinishThreads, stream, args);
}
bool launch_prepare(const GradientArgs& args, Stream stream) {
  return launch(prepare_kernel, args.in.rows, kFinishThreads, stream, args);
}

}  // namespace gpu
}  // namespace fusedkl
