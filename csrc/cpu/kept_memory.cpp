#include "kept_memory.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedkl {

#if defined(__linux__)

namespace {

bool switched_on(const char* variable) {
  const char* const value = std::getenv(variable);
  return !value || std::strcmp(value, "0") != 0;
}

char* map(size_t bytes) {
  void* const got = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return nullptr;
  char* const first = static_cast<char*>(got);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(got) % kHugePage) % kHugePage;
  if (head > 0) munmap(first, head);
  if (head < kHugePage) munmap(first + head + bytes, kHugePage - head);
  advise_huge_pages(first + head, bytes);
  return first + head;
}

// Blocks in use and blocks kept are never more, together, than what was once in use at one time: keeping does not raise the
// peak. A block that kUnused requests did not want goes back to the system.
//
// Nobody waits for the lock: who does not get it goes to the system. So a child that fork() leaves with a lock that some other
// thread held is only slower.
class Pool {
 public:
  KeptBlock take(size_t bytes) {
    KeptBlock found;
    std::vector<KeptBlock> dropped;
    {
      const std::unique_lock<std::mutex> mine(lock_, std::try_to_lock);
      if (mine) {
        requests_++;
        found = best(bytes);
        const size_t in_use = in_use_ + (found ? found.bytes : bytes);
        most_in_use_ = std::max(most_in_use_, in_use);
        dropped = unwanted(in_use);
      }
    }
    for (const KeptBlock& b : dropped) munmap(b.data, b.bytes);
    if (!found) found = {map(bytes), bytes};
    if (found) in_use_ += found.bytes;
    return found;
  }

  void give(KeptBlock block) {
    in_use_ -= block.bytes;
    // The system may take the pages back when it is short of memory, and until then the next writer finds them mapped.
    if (madvise(block.data, block.bytes, MADV_FREE) == 0) {
      const std::unique_lock<std::mutex> mine(lock_, std::try_to_lock);
      if (mine) {
        block.last_used = requests_;
        kept_.push_back(block);
        return;
      }
    }
    munmap(block.data, block.bytes);
  }

 private:
  static constexpr size_t kUnused = 16;

  // The smallest that fits without a quarter of it to spare.
  KeptBlock best(size_t bytes) {
    auto fits = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it)
      if (it->bytes >= bytes && it->bytes - bytes <= it->bytes / 4 && (fits == kept_.end() || it->bytes < fits->bytes)) fits = it;
    if (fits == kept_.end()) return {};
    const KeptBlock block = *fits;
    kept_.erase(fits);
    return block;
  }

  // Oldest first: what no request wanted lately, and what must make way for the bytes in use.
  std::vector<KeptBlock> unwanted(size_t in_use) {
    size_t total = in_use;
    for (const KeptBlock& b : kept_) total += b.bytes;
    auto end = kept_.begin();
    for (; end != kept_.end() && (total > most_in_use_ || requests_ - end->last_used > kUnused); ++end) total -= end->bytes;
    std::vector<KeptBlock> dropped(kept_.begin(), end);
    kept_.erase(kept_.begin(), end);
    return dropped;
  }

  std::mutex lock_;
  std::vector<KeptBlock> kept_;  // in the order in which they came back
  std::atomic<size_t> in_use_{0};
  size_t most_in_use_ = 0, requests_ = 0;
};

Pool& pool() {
  static Pool& one = *new Pool;  // never destroyed: gradients may outlive static objects
  return one;
}

}  // namespace

void advise_huge_pages(void* begin, size_t bytes) {
  static const bool wanted = switched_on("FUSEDKL_HUGE_PAGES");
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin), first = (at + kHugePage - 1) / kHugePage * kHugePage,
                  end = (at + bytes) / kHugePage * kHugePage;
  // advice only: where it is refused, small pages serve
  if (wanted && bytes >= kLarge && end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

KeptBlock take_memory(size_t bytes) {
  static const bool wanted = switched_on("FUSEDKL_KEEP_MEMORY");
  if (!wanted || bytes < kLarge) return {};
  return pool().take((bytes + kHugePage - 1) / kHugePage * kHugePage);
}

void give_memory(KeptBlock block) { pool().give(block); }

#else

void advise_huge_pages(void*, size_t) {}
KeptBlock take_memory(size_t) { return {}; }
void give_memory(KeptBlock) {}

#endif

}  // namespace fusedkl
