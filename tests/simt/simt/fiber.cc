#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext() asks the kernel to save the signal mask: 350 ns a switch where these few instructions take 3,
// and a launch of 256 threads switches a million times.
#if defined(__x86_64__) && defined(__linux__)
#define SIMT_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace simt {

#if defined(SIMT_OWN_SWITCH)

// Saves the registers that a call preserves on the stack and its pointer in *from, then continues at `to`.
extern "C" void simt_switch_stacks(void** from, void* to);
asm(R"(
.text
.p2align 4
.type simt_switch_stacks, @function
simt_switch_stacks:
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
.size simt_switch_stacks, .-simt_switch_stacks
)");

#endif

namespace {

// Registers of a kernel live here too; sanitizers make frames several times larger.
constexpr size_t kStackBytes = size_t(256) << 10;

}  // namespace

struct Fiber::Switch {
  char* mapping = nullptr;
  size_t guard_bytes = 0;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
#if defined(SIMT_OWN_SWITCH)
  void* fiber = nullptr;
  void* scheduler = nullptr;
#else
  ucontext_t fiber, scheduler;
#endif
#if defined(SIMT_ASAN)
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
  void* fake_stack = nullptr;
#endif

  void enter();
  void leave(bool for_good);
};

namespace {

Fiber::Switch* starting;

void begin() {
  Fiber::Switch* self = starting;
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &self->scheduler_stack, &self->scheduler_stack_bytes);
#endif
  self->entry(self->argument);
  std::abort();  // entry() ends in finish()
}

}  // namespace

void Fiber::Switch::enter() {
  starting = this;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack, stack_bytes);
#endif
#if defined(SIMT_OWN_SWITCH)
  simt_switch_stacks(&scheduler, fiber);
#else
  swapcontext(&scheduler, &fiber);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::Switch::leave(bool for_good) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
#else
  (void)for_good;
#endif
#if defined(SIMT_OWN_SWITCH)
  simt_switch_stacks(&fiber, scheduler);
#else
  swapcontext(&fiber, &scheduler);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

Fiber::Fiber() : switch_(new Switch) {
  static int made = 0;
  switch_->guard_bytes = size_t(sysconf(_SC_PAGESIZE));
  void* mapping = mmap(nullptr, switch_->guard_bytes + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // The lowest page stays closed: a stack that overflows ends the program instead of another stack.
  if (mapping == MAP_FAILED || mprotect(mapping, switch_->guard_bytes, PROT_NONE) != 0) {
    delete switch_;
    throw std::bad_alloc();
  }
  switch_->mapping = static_cast<char*>(mapping);
  switch_->stack = switch_->mapping + switch_->guard_bytes;
  // Tops that differ modulo 4096, or all stacks would share a few lines of the cache.
  switch_->stack_bytes = kStackBytes - size_t(made++ % 16) * 256;
}

Fiber::~Fiber() {
#if defined(SIMT_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(switch_->stack, switch_->stack_bytes);
#endif
  munmap(switch_->mapping, switch_->guard_bytes + kStackBytes);
  delete switch_;
}

void Fiber::start(void (*entry)(void*), void* argument) {
  switch_->entry = entry;
  switch_->argument = argument;
#if defined(SIMT_ASAN)
  // Frames of a run that was dropped may still be marked.
  ASAN_UNPOISON_MEMORY_REGION(switch_->stack, switch_->stack_bytes);
#endif
#if defined(SIMT_OWN_SWITCH)
  // As if begin() had been called: the stack a multiple of 16 before its return address was pushed.
  void** top = reinterpret_cast<void**>(switch_->stack + switch_->stack_bytes);
  *--top = nullptr;  // the return address of begin(), which does not return
  *--top = reinterpret_cast<void*>(&begin);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  switch_->fiber = top;
#else
  getcontext(&switch_->fiber);
  switch_->fiber.uc_stack.ss_sp = switch_->stack;
  switch_->fiber.uc_stack.ss_size = switch_->stack_bytes;
  switch_->fiber.uc_link = nullptr;
  makecontext(&switch_->fiber, begin, 0);
#endif
}

void Fiber::resume() { switch_->enter(); }
void Fiber::suspend() { switch_->leave(false); }

void Fiber::finish() {
  switch_->leave(true);
  std::abort();  // resumed after its end
}

}  // namespace simt
