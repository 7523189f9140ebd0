// Fibers: each emulated thread has a stack of its own and runs until it pauses.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace casvit::cuda::emulation {

class Fibers {
 public:
  static constexpr size_t stack_bytes = 128 << 10;  // only the pages that are touched cost memory

  ~Fibers() { release(); }

  // Forgets what ran before: `count` fibers that start in `entry` when they are first resumed.
  // What is on the stack of a fiber that did not end is dropped without destructors.
  void reset(int count, void (*entry)()) {
    if (count > capacity_) {
      release();
      void* slab = mmap(nullptr, count * stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (slab == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the threads");
      for (int i = 0; i < count; i++)  // one that overflows ends the process, not another stack
        mprotect(static_cast<char*>(slab) + i * stack_bytes, guard_bytes, PROT_NONE);
      stacks_ = static_cast<unsigned char*>(slab);
      capacity_ = count;
    }
    entry_ = entry;
    fibers_.resize(count);
    for (Fiber& fiber : fibers_) fiber.started = false;
  }

  // Runs fiber i until it pauses. One that ends must pause for good.
  void resume(int i) {
    current_ = i;
    enter(fibers_[i]);
  }

  // From within a fiber: back to whoever resumed it.
  __attribute__((noinline)) void pause() {
    if (_setjmp(fibers_[current_].at) == 0) _longjmp(home_, 1);
  }

 private:
  struct Fiber {
    jmp_buf at;
    bool started;
  };

  static constexpr size_t guard_bytes = 4 << 10;  // a page

  // setcontext only for the first step: it asks the kernel for signal masks, setjmp does not.
  __attribute__((noinline)) void enter(Fiber& fiber) {
    if (_setjmp(home_) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&first_);
    first_.uc_stack.ss_sp = stacks_ + current_ * stack_bytes;
    first_.uc_stack.ss_size = stack_bytes;
    first_.uc_link = nullptr;
    makecontext(&first_, entry_, 0);
    setcontext(&first_);
  }

  void release() {
    if (stacks_) munmap(stacks_, capacity_ * stack_bytes);
    stacks_ = nullptr;
    capacity_ = 0;
  }

  std::vector<Fiber> fibers_;
  unsigned char* stacks_ = nullptr;
  int capacity_ = 0;
  int current_ = 0;
  void (*entry_)() = nullptr;
  jmp_buf home_;
  ucontext_t first_;
};

}  // namespace casvit::cuda::emulation
