// The kernels of rows as K given tokens and all others together.
#include "topk.cuh"

namespace fusedkl {
namespace gpu {

// run(kernels' view of rows of this dtype)
template <class Run>
static bool by_rows(const TopkArgs& a, bool vectors, const Run& run) {
  if (!vectors || a.in.dx == DType::f64) return run(AnyRows{});
  if (a.in.dx == DType::f32) return run(VectorRows<DType::f32, false>{});
  if (a.in.dx == DType::bf16) return run(VectorRows<DType::bf16, false>{});
  return run(VectorRows<DType::f16, false>{});
}

bool launch_topk(const TopkArgs& a, bool vectors, Stream stream) {
  const int64_t blocks = a.in.rows * a.in.cut.count;
  auto run = [&](auto kernel) { return launch(kernel, blocks, kTopkThreads, stream, a); };
  return by_rows(a, vectors, [&](auto rows) { return run(topk_sums_kernel<decltype(rows)>); }) &&
         launch(topk_finish_kernel, a.in.rows, kFinishThreads, stream, a);
}

bool launch_topk_gradient(const TopkArgs& a, bool vectors, Stream stream) {
  const int64_t blocks = a.in.rows * a.in.pieces();
  auto run = [&](auto kernel) { return launch(kernel, blocks, kTopkThreads, stream, a); };
  return by_rows(a, vectors, [&](auto rows) { return run(topk_gradient_kernel<decltype(rows)>); });
}

}  // namespace gpu
}  // namespace fusedkl
