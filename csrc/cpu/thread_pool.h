// The caller's threads.
#pragma once

#include <cstdint>

namespace casvit {

// Runs tasks [0, count) on the caller's thread pool, each once.
struct Pool {
  int64_t threads;
  void (*run)(int64_t count, void (*task)(void* context, int64_t index), void* context);
};

template <class F>
void run(const Pool& pool, int64_t count, const F& f) {
  if (pool.threads == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  pool.run(
      count, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
      const_cast<F*>(&f));
}

// A thread pool does not survive fork(): the child computes on its one thread.
bool in_forked_child();

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace casvit
