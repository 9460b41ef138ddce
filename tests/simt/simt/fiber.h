// One CUDA thread: a stack of its own, run in turns with the scheduler on one CPU thread.
#pragma once
#include <cstddef>

namespace simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument), which must end in finish(). What ran before is dropped:
  // its destructors are not run.
  void start(void (*entry)(void*), void* argument);
  // The scheduler's side: runs the fiber until it suspends or finishes.
  void resume();
  // The fiber's side.
  void suspend();
  [[noreturn]] void finish();

  struct Switch;

 private:
  Switch* switch_;
};

}  // namespace simt
