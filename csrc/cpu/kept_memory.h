// Memory of large gradients, kept from one training step to the next: the system clears each page of fresh memory at its first
// touch, which costs as much as computing the gradient.
#pragma once
#include <cstddef>

namespace fusedkl {

struct KeptBlock {
  char* data = nullptr;
  size_t bytes = 0;      // of the block, which may be longer than what was asked for
  size_t last_used = 0;  // counted in requests

  explicit operator bool() const { return data != nullptr; }
};

// Uninitialised, aligned to 2 MiB; nothing for small requests, where the system is not Linux or refuses, and under
// FUSEDKL_KEEP_MEMORY=0.
KeptBlock take_memory(size_t bytes);
void give_memory(KeptBlock block);

// Large memory had better be on huge pages (FUSEDKL_HUGE_PAGES=0: as the system likes): 512 times fewer page faults.
constexpr size_t kHugePage = size_t{2} << 20, kLarge = 2 * kHugePage;
void advise_huge_pages(void* begin, size_t bytes);

}  // namespace fusedkl
