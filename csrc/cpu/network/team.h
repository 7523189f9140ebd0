// Threads that compute one network together, in one parallel region, meeting at barriers.
#pragma once

#include <atomic>
#include <thread>

#include "cpu/thread_pool.h"

namespace casvit {

// A turn takes a fraction of a microsecond hot. Whoever waits longer gives its core away: those it
// waits for may need it.
class Patience {
 public:
  void wait() {
    if (++turns_ > 2000) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb" ::: "memory");
#endif
  }

 private:
  int turns_ = 0;
};

class Team {
 public:
  explicit Team(int64_t size = 1) : size_(size) {}
  int64_t size() const { return size_; }
  void wait() {
    if (size_ == 1) return;
    const int64_t turn = turn_.load(std::memory_order_relaxed);
    if (here_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      here_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (Patience p; turn_.load(std::memory_order_acquire) == turn;) p.wait();
  }

 private:
  template <class F>
  friend void with_team(const ThreadPool&, const F&);
  std::atomic<int64_t> size_;
  alignas(64) std::atomic<int64_t> here_{0};
  alignas(64) std::atomic<int64_t> turn_{0};
};

// Calls f(team, rank) on as many threads as the pool gives, at the same time; they are at most
// pool.threads. A pool inside of another one's region gives one: then f has a team of one.
template <class F>
void with_team(const ThreadPool& pool, const F& f) {
  if (pool.threads == 1) {
    Team alone;
    return f(alone, 0);
  }
  struct Shared {
    const F& f;
    int64_t threads;
    Team team;
    std::atomic<int64_t> come{0}, ranges{0};
  } shared{f, pool.threads, Team(), {0}, {0}};
  pool.run_ranges(
      pool.threads,
      [](void* context, int64_t begin, int64_t end) {
        Shared& s = *static_cast<Shared*>(context);
        s.ranges.fetch_add(1, std::memory_order_relaxed);
        s.come.fetch_add(end - begin, std::memory_order_acq_rel);
        for (Patience p; s.come.load(std::memory_order_acquire) < s.threads;) p.wait();
        const int64_t size = s.ranges.load(std::memory_order_relaxed);
        s.team.size_ = size;  // all write the same
        s.f(s.team, begin / divide_up(s.threads, size));
      },
      &shared);
}

}  // namespace casvit
