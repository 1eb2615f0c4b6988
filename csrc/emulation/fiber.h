// A function with a stack of its own that can be left and entered again.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>

#if defined(__x86_64__)

// ucontext asks the kernel for the signal mask at every switch; saving the callee-saved registers is all that is
// needed.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void capt_switch_context(void** from, void* to);
__asm__(R"(
.text
.weak capt_switch_context
.type capt_switch_context, @function
capt_switch_context:
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
.size capt_switch_context, .-capt_switch_context
)");

inline void switch_context(Context& from, Context& to) { capt_switch_context(&from.stack_pointer, to.stack_pointer); }

#else

#include <ucontext.h>

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

class Fiber {
 public:
  Context context;

  // The next switch to `context` calls entry, which must not return.
  void start(void (*entry)()) {
    if (stack_ == nullptr) stack_.reset(new char[kStackBytes]);
#if defined(__x86_64__)
    const auto top = (reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) & ~uintptr_t{15};
    auto* slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // a return address that keeps the stack aligned as after a call
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    context.stack_pointer = slot;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = stack_.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;
  std::unique_ptr<char[]> stack_;
};
