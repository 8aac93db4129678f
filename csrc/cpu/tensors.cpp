#include "tensors.h"

#include "kept_memory.h"

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
  advise_huge_pages(t.mutable_data_ptr(), static_cast<size_t>(t.numel() * size_of(dtype)));
  return t;
}

Tensor new_gradient(const Tensor& like, DType dtype) {
  const std::vector<int64_t> sizes = sizes_of(like);
  const KeptBlock block = take_memory(static_cast<size_t>(like.numel() * size_of(dtype)));
  if (!block) return new_result(like, sizes, dtype);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return torch::stable::from_blob(block.data, sizes, strides, like.device(), scalar_type_of(dtype),
                                  [block](void*) { give_memory(block); });
}

}  // namespace fusedkl
