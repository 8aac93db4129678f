// CUDA's names for what the shim does. Included by shim.h.
#pragma once

#define threadIdx (shim::self().thread)
#define blockIdx (shim::block->index)
#define blockDim (shim::block->size)
#define gridDim (shim::block->grid)
#define __syncthreads() shim::barrier(__LINE__, false)

inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::meet(mask, "syncwarp", 0, true); }
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int other) {
  return shim::exchange(mask, v, "shuffle xor", [=](int lane) { return lane ^ other; });
}
template <class T>
inline T __shfl_sync(unsigned mask, T v, int from) {
  return shim::exchange(mask, v, "shuffle", [=](int) { return from & 31; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return shim::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return shim::ballot(mask, predicate != 0) != 0; }
inline unsigned atomicOr(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
inline int __ffs(int v) { return __builtin_ffs(v); }

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T v) {
  *p = v;
}

// A copy lands at the wait and not before: without one, what is read is NaN.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  auto& groups = shim::self().copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, bytes});
}
inline void __pipeline_commit() { shim::self().copies.emplace_back(); }
inline void __pipeline_wait_prior(size_t left) {
  auto& groups = shim::self().copies;
  while (groups.size() > left + 1) {
    for (const shim::Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin());
  }
}
