// Fibers: a stack each, switched by hand, and known to the sanitizers.
#pragma once
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SHIM_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#else
#define SHIM_UNCHECKED
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, then takes another's. A system call per switch, as swapcontext
// makes, would be most of a test's time.
extern "C" void shim_switch(void** save, void* to);
asm(R"(
.text
.weak shim_switch
.type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace shim {

constexpr std::size_t kStack = 128 * 1024;

class Context {
 public:
  SHIM_UNCHECKED void start(void (*entry)(), char* stack) {
    stack_ = stack;
#if defined(__x86_64__)
    // the switch pops six registers and returns into entry, whose stack must be off by 8 as after a call
    void** top = reinterpret_cast<void**>(stack + kStack) - 1;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    at_ = top;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = kStack;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
#endif
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  // The context of the caller's own thread, which needs no stack.
  void adopt() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  void destroy() {
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_);
#endif
  }

  // `last`: the caller never comes back.
  SHIM_UNCHECKED void switch_to(Context& to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, to.bottom(), to.size());
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.tsan_, 1);  // 1: a switch orders nothing
#endif
    (void)last;
#if defined(__x86_64__)
    shim_switch(&at_, to.at_);
#else
    swapcontext(&at_, &to.at_);
#endif
    arrived();
  }

  // First thing on a new fiber; `from` then learns its own stack's bounds.
  SHIM_UNCHECKED void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
#endif
  }

#if defined(__SANITIZE_ADDRESS__)
  void bounds(const void* bottom, std::size_t size) { own_bottom_ = bottom, own_size_ = size; }
#endif

 private:
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom() const { return stack_ ? stack_ : own_bottom_; }
  std::size_t size() const { return stack_ ? kStack : own_size_; }
  void* fake_stack_ = nullptr;
  const void* own_bottom_ = nullptr;
  std::size_t own_size_ = 0;
#endif
  char* stack_ = nullptr;
#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
};

}  // namespace shim
