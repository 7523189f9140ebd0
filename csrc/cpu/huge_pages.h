// Large maps in pages of 2 MiB instead of 4 KiB: some hundred times fewer page faults and TLB
// misses.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace casvit {

constexpr int64_t HUGE_PAGE = int64_t{2} << 20;
constexpr int64_t HUGE_FROM = 4 * HUGE_PAGE;  // below it the question costs as much as it saves

// A wish for the whole pages within; the system may not grant it, and nothing but speed depends on
// it.
inline void wish_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < HUGE_FROM) return;
  const uintptr_t page = static_cast<uintptr_t>(HUGE_PAGE),
                  begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace casvit
