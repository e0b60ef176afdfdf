// Stacks that run in turns.
//
// On x86-64 a switch is a dozen instructions. swapcontext, which serves elsewhere, makes a system
// call for the signal mask each time, and under AddressSanitizer it makes the whole stack that it
// goes to addressable, so that stray accesses to variables on it go unseen.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace tir::emulation {

#if defined(__x86_64__)

struct Fiber {
  void* top;  // of its stack, where its registers lie while others run
};

extern "C" void tir_switch_stack(void** from, void* to);

asm(R"(
  .text
  .globl tir_switch_stack
  .hidden tir_switch_stack
  .type tir_switch_stack, @function
tir_switch_stack:
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
  .size tir_switch_stack, . - tir_switch_stack
)");

// Lets a fiber begin with a function that never returns; the stack's end is aligned to 16 bytes.
inline void prepare(Fiber& fiber, unsigned char* stack, size_t size, void (*entry)()) {
  void** end = reinterpret_cast<void**>(stack + size);
  end[-1] = nullptr;  // where a call would have left the address to return to
  end[-2] = reinterpret_cast<void*>(entry);
  fiber.top = end - 8;  // below are the six registers
}

inline void switch_fibers(Fiber& from, const Fiber& to) { tir_switch_stack(&from.top, to.top); }

#else

struct Fiber {
  ucontext_t context;
};

inline void prepare(Fiber& fiber, unsigned char* stack, size_t size, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

inline void switch_fibers(Fiber& from, const Fiber& to) {
  swapcontext(&from.context, &to.context);
}

#endif

}  // namespace tir::emulation
