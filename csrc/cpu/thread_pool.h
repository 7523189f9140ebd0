// Parallel loops on the threads of the caller.
#pragma once

#include <cstdint>

namespace casvit {

// run: calls task(context, i) once for each i in [0, count), on any thread; run_ranges:
// task(context, begin, end) for ranges of one length (the last may be shorter), one for each thread
// that takes part.
struct ThreadPool {
  int64_t threads;
  void (*run)(int64_t count, void (*task)(void* context, int64_t index), void* context);
  void (*run_ranges)(int64_t count, void (*task)(void* context, int64_t begin, int64_t end),
                     void* context) = nullptr;
};

template <class F>
void parallel_for(const ThreadPool& pool, int64_t count, const F& f) {
  if (pool.threads == 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  pool.run(
      count, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
      const_cast<F*>(&f));
}

// The threads of a pool do not survive fork(): a child computes on its one thread.
bool in_forked_child();

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace casvit
