// Runs CUDA device code on the CPU: a CUDA thread is a fiber, a block an OS thread, a cluster a group of OS threads.
// Barriers, votes and shuffles have the semantics that CUDA documents, and every misuse of them ends the process with a message:
// a mask without its caller, lanes or threads that meet at different operations, a barrier after a thread left, a deadlock,
// a peer's shared memory used after the last cluster barrier. Under TSan only barriers order memory, shuffles do not.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <math.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fibers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#if defined(SHIM_ONE_BLOCK_AT_A_TIME)  // plain statics, so that ASan surrounds them with red zones; no clusters then
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

namespace shim {

struct Block;

struct Cluster {
  std::vector<Block*> blocks;
  explicit Cluster(int count) : blocks(static_cast<size_t>(count)) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned generation = generation_;
    if (++arrived_ == static_cast<int>(blocks.size())) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
  unsigned generation_ = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  Context context;
  uint3 thread;
  int index = 0, phase = 0;
  bool done = false, ready = true;
  std::vector<std::vector<Copy>> copies;  // committed groups of asynchronous copies, the last one open
};

struct Warp {
  unsigned live = 0, arrived = 0;
  unsigned mask[32] = {};
  int phase[32] = {};
  const char* operation[32] = {};
  uint64_t value[2][32] = {};  // by parity: a lane may be one operation ahead of another, never two
};

struct Block {
  dim3 grid, size;
  uint3 index;
  unsigned rank = 0;
  Cluster* cluster = nullptr;
  char* anchor = nullptr;  // of this thread's static shared memory
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> dynamic;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  int current = 0, live = 0, arrived = 0, line = 0;
  bool cluster_barrier = false, progress = false;
  unsigned cluster_barriers = 0, peer_used_at = 0;
};

inline thread_local Block* block;
inline thread_local char anchor;

[[noreturn]] inline void fail(const char* what, int a = 0, int b = 0) {
  std::fprintf(stderr, "shim: %s (%d, %d)", what, a, b);
  if (block) std::fprintf(stderr, ", block %u, thread %d", block->index.x, block->current);
  std::fputc('\n', stderr);
  std::abort();
}

SHIM_UNCHECKED inline Fiber& self() { return block->fibers[static_cast<size_t>(block->current)]; }
SHIM_UNCHECKED inline void acquire(void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(p);
#endif
  (void)p;
}
SHIM_UNCHECKED inline void release(void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(p);
#endif
  (void)p;
}

SHIM_UNCHECKED inline void wait_until_ready(Fiber& f) {
  f.ready = false;
  f.context.switch_to(block->scheduler);
}

SHIM_UNCHECKED inline void entry() {
  self().context.arrived();
  acquire(block);
  (*block->body)();
  release(block);
  Fiber& f = self();
  f.done = true;
  f.ready = false;
  --block->live;
  block->warps[static_cast<size_t>(f.index / 32)].live &= ~(1u << (f.index & 31));
  f.context.switch_to(block->scheduler, true);
}

// Meets the other lanes of the mask. Returns the parity under which the values of this operation are kept.
SHIM_UNCHECKED inline int meet(unsigned mask, const char* operation, uint64_t value, bool orders) {
  Fiber& f = self();
  Warp& w = block->warps[static_cast<size_t>(f.index / 32)];
  const int lane = f.index & 31, parity = ++f.phase & 1;
  if (!(mask >> lane & 1)) fail("caller not in its own mask", lane);
  if (mask & ~w.live) fail("mask names a lane that left or never was");
  w.mask[lane] = mask;
  w.phase[lane] = f.phase;
  w.operation[lane] = operation;
  w.value[parity][lane] = value;
  w.arrived |= 1u << lane;
  if (orders) release(&w);
  if ((w.arrived & mask) == mask) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      if (w.mask[l] != mask) fail("lanes of a warp name different masks", lane, l);
      if (w.operation[l] != operation || w.phase[l] != f.phase) fail("lanes of a warp meet in different operations", lane, l);
      block->fibers[static_cast<size_t>((f.index & ~31) + l)].ready = true;
    }
    w.arrived &= ~mask;
  } else {
    wait_until_ready(f);
  }
  if (orders) acquire(&w);
  return parity;
}

template <class T, class Source>
SHIM_UNCHECKED inline T exchange(unsigned mask, T v, const char* operation, Source source) {
  static_assert(sizeof(T) <= 8);
  uint64_t sent = 0;
  __builtin_memcpy(&sent, &v, sizeof(T));
  const int parity = meet(mask, operation, sent, false), lane = self().index & 31, from = source(lane);
  if (!(mask >> from & 1)) fail("a shuffle reads a lane outside of the mask", lane, from);
  T got;
  __builtin_memcpy(&got, &block->warps[static_cast<size_t>(self().index / 32)].value[parity][from], sizeof(T));
  return got;
}

SHIM_UNCHECKED inline unsigned ballot(unsigned mask, bool predicate) {
  const int parity = meet(mask, "vote", predicate, false);
  const Warp& w = block->warps[static_cast<size_t>(self().index / 32)];
  unsigned result = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1 && w.value[parity][l]) result |= 1u << l;
  return result;
}

SHIM_UNCHECKED inline void barrier(int line, bool cluster) {
  Block& b = *block;
  if (b.live != static_cast<int>(b.fibers.size())) fail("a barrier after a thread of the block left", line);
  if (b.arrived && (b.line != line || b.cluster_barrier != cluster)) fail("threads meet at different barriers", b.line, line);
  b.line = line;
  b.cluster_barrier = cluster;
  void* const order = cluster && b.cluster ? static_cast<void*>(b.cluster) : &b;
  release(order);
  if (++b.arrived == b.live) {
    if (cluster) {
      if (b.cluster) b.cluster->wait();
      ++b.cluster_barriers;
    }
    b.arrived = 0;
    for (Fiber& f : b.fibers) f.ready = true;
  } else {
    wait_until_ready(self());
  }
  acquire(order);
}

// The stacks of a block's fibers. Kept for the thread's next block, whose pages then are there already; a sanitizer must see
// each block's memory come and go.
struct Stacks {
  char* first;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  explicit Stacks(unsigned count) : first(static_cast<char*>(std::malloc(count * kStack))) {}
  ~Stacks() { std::free(first); }
#else
  explicit Stacks(unsigned count) {
    static thread_local std::unique_ptr<char[]> kept;
    static thread_local unsigned have = 0;
    if (have < count) kept.reset(new char[(have = count) * kStack]);
    first = kept.get();
  }
#endif
};

SHIM_UNCHECKED inline void run(Block& b) {
  block = &b;
  b.anchor = &anchor;
  const unsigned threads = b.size.x * b.size.y * b.size.z;
  b.fibers.assign(threads, Fiber{});
  b.warps.assign((threads + 31) / 32, Warp{});
  b.live = static_cast<int>(threads);
  if (b.cluster) {
    b.cluster->blocks[b.rank] = &b;
    b.cluster->wait();
  }
  release(&b);
  Stacks memory(threads);
  char* const stacks = memory.first;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.index = static_cast<int>(i);
    f.thread = make_uint3(i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y));
    f.context.start(entry, stacks + i * kStack);
    b.warps[i / 32].live |= 1u << (i & 31);
  }
  b.scheduler.adopt();
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* bottom = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &size);
  pthread_attr_destroy(&attributes);
  b.scheduler.bounds(bottom, size);
#endif
  static const bool backwards = std::getenv("SHIM_BACKWARDS") != nullptr;  // a second legal schedule
  while (b.live > 0) {
    b.progress = false;
    for (unsigned k = 0; k < threads; ++k) {
      const unsigned i = backwards ? threads - 1 - k : k;
      if (!b.fibers[i].ready) continue;
      b.progress = true;
      b.current = static_cast<int>(i);
      b.scheduler.switch_to(b.fibers[i].context);
    }
    if (!b.progress) fail("deadlock: no thread can move", b.arrived, b.live);
  }
  if (b.peer_used_at == b.cluster_barriers + 1) fail("a peer's shared memory was used after the last cluster barrier");
  acquire(&b);
  for (Fiber& f : b.fibers) f.context.destroy();
  if (b.cluster) b.cluster->wait();
}

inline int cluster_size() { return block->cluster ? static_cast<int>(block->cluster->blocks.size()) : 1; }
inline int cluster_rank() { return static_cast<int>(block->rank); }
// Dynamic shared memory of another block of the cluster.
template <class T>
SHIM_UNCHECKED inline T* peer(T* own, int rank) {
  if (rank < 0 || rank >= cluster_size()) fail("no block of this rank in the cluster", rank);
  if (!block->cluster) return own;
  if (rank != cluster_rank()) block->peer_used_at = block->cluster_barriers + 1;
  const std::ptrdiff_t offset = reinterpret_cast<char*>(own) - block->dynamic.data();
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(block->dynamic.size())) fail("not dynamic shared memory", rank);
  return reinterpret_cast<T*>(block->cluster->blocks[static_cast<size_t>(rank)]->dynamic.data() + offset);
}

inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block->dynamic.data()); }

// A line for each launch in the file that SHIM_LAUNCHES names: the kernel, as an address in its library, and what it ran as.
inline void log_launch(const void* kernel, unsigned blocks, unsigned threads, int cluster) {
  const char* const path = std::getenv("SHIM_LAUNCHES");
  if (!path) return;
  Dl_info in{};
  dladdr(kernel, &in);
  std::FILE* const file = std::fopen(path, "a");
  if (!file) fail("the file that SHIM_LAUNCHES names cannot be written");
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(in.dli_fbase);
  std::fprintf(file, "%tx %u %u %d\n", offset, blocks, threads, cluster);
  std::fclose(file);
}

template <class Args>
void launch(void (*kernel)(Args), unsigned blocks, unsigned threads, size_t shared_bytes, int cluster, const Args& args) {
  log_launch(reinterpret_cast<const void*>(kernel), blocks, threads, cluster);
  const std::function<void()> body = [&] { kernel(args); };
  auto one = [&](unsigned index, unsigned rank, Cluster* group) {
    auto owner = std::make_unique<Block>();
    Block& b = *owner;
#if defined(__SANITIZE_THREAD__)
    (void)owner.release();  // TSan must not see its address again
#endif
    b.grid = dim3(blocks);
    b.size = dim3(threads);
    b.index = make_uint3(index, 0, 0);
    b.rank = rank;
    b.cluster = group;
    b.body = &body;
    b.dynamic.assign(shared_bytes, static_cast<char>(0xff));  // NaN where nobody wrote
    run(b);
  };
  for (unsigned first = 0; first < blocks; first += static_cast<unsigned>(cluster)) {
    if (cluster == 1) {
      one(first, 0, nullptr);
      continue;
    }
    Cluster group(cluster);
    std::vector<std::thread> threads_of;
    for (int r = 0; r < cluster; ++r)
      threads_of.emplace_back([&, r] { one(first + static_cast<unsigned>(r), static_cast<unsigned>(r), &group); });
    for (std::thread& t : threads_of) t.join();
  }
}

}  // namespace shim

#include "intrinsics.h"
