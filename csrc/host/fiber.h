// Stacks of their own for functions that take turns on one CPU thread. Part of scheduler.cpp.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "sanitizers.h"

#if defined(__x86_64__) && !defined(VOCO_UCONTEXT)
// Saves what a callee must keep on this stack and its pointer in *from, and returns on the stack of `to`.
extern "C" __attribute__((visibility("hidden"))) void voco_switch_stack(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl voco_switch_stack
.hidden voco_switch_stack
.type voco_switch_stack, @function
voco_switch_stack:
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
.size voco_switch_stack, . - voco_switch_stack
)");
#else
// Up to nine times slower: each switch calls the system.
#include <ucontext.h>
#define VOCO_SWITCH_BY_SYSTEM
#endif

namespace voco::host {

constexpr size_t kPage = 4096;
// Untouched pages cost nothing, except where ThreadSanitizer clears its notes on them.
constexpr size_t kStackBytes = (kDetectsRaces ? 64 : 256) * 1024;

inline char* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

class Fiber {
 public:
  // The stack that calls this. It can be switched from, and then to.
  Fiber() = default;

  // A new stack, on which `main` begins at the first switch to it, with arrive(), and never returns.
  explicit Fiber(void (*main)()) : main_(main), stack_(map_memory(kPage + kStackBytes) + kPage), bytes_(kStackBytes) {
    mprotect(stack_ - kPage, kPage, PROT_NONE);
    bottom_ = stack_;
    rewind();
  }

  Fiber(const Fiber&) = delete;

  // Before the fiber is deleted; ThreadSanitizer may know it longer than its stack.
  void unmap() { munmap(stack_ - kPage, kPage + kStackBytes); }

  // Forgets what runs here: the next switch to the fiber begins anew.
  void rewind() {
    open_memory(stack_, kStackBytes);
#ifdef VOCO_SWITCH_BY_SYSTEM
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, main_, 0);
#else
    // Six registers, the address that the switch returns to, and the null that ends a backtrace.
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(main_);
    context_ = top;
#endif
  }

  // Leaves this fiber, which runs, for another; returns when some fiber switches back.
  void switch_to(Fiber& next) {
    previous_ = this;
    leave_stack(&frames_, next.bottom_, next.bytes_);
    // Not ignored meanwhile: it may never be returned to, and must not end like that.
    watch();
    take_identity(next.identity);
#ifdef VOCO_SWITCH_BY_SYSTEM
    swapcontext(&context_, &next.context_);
#else
    voco_switch_stack(&context_, next.context_);
#endif
    stop_watching();
    arrive();
  }

  // On the fiber that has been switched to.
  void arrive() { enter_stack(frames_, &previous_->bottom_, &previous_->bytes_); }

  // As ThreadSanitizer knows it.
  void* identity = nullptr;

 private:
#ifdef VOCO_SWITCH_BY_SYSTEM
  ucontext_t context_ = {};
#else
  void* context_ = nullptr;  // the stack pointer, below which the registers are saved
#endif
  void (*main_)() = nullptr;
  char* stack_ = nullptr;  // above a page that no one may touch
  // As AddressSanitizer knows them; it tells those of the first stack when that is left.
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* frames_ = nullptr;

  static inline Fiber* previous_ = nullptr;
};

}  // namespace voco::host
