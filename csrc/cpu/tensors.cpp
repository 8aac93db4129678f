#include "tensors.h"

#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedkl {

const KernelTable& kernels() {
  const KernelTable* table = kernels_or_null();
  STD_TORCH_CHECK(
      table,
      "FUSEDKL_CPU_ISA names an instruction set that this machine or build lacks; accepted: portable, avx2, avx512, avx512_bf16");
  return *table;
}

Tensor new_result(const Tensor& like, std::vector<int64_t> sizes, DType dtype) {
  Tensor t = torch::stable::new_empty(like, sizes, scalar_type_of(dtype));
#if defined(__linux__)
  static const bool wanted = [] {
    const char* v = std::getenv("FUSEDKL_HUGE_PAGES");
    return !v || std::strcmp(v, "0") != 0;
  }();
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(t.numel() * size_of(dtype));
  if (wanted && bytes >= 2 * kHuge) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + bytes) / kHuge * kHuge;
    // advice only: where it is refused, small pages serve
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return t;
}

}  // namespace fusedkl
