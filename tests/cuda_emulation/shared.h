// The shared memory of one block: bytes, what is known of each, and the race detector.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace casvit::cuda::emulation {

// Who touches a byte, and since when it is ordered behind others. The clock counts barriers: what
// happened before the time `block_synced` is ordered before all that the block does now, and so on.
struct Access {
  int thread;  // -1: all lanes of the warp
  int warp;
  uint32_t lanes;  // of the warp
  uint32_t now, warp_synced, block_synced, cluster_synced;
  int line;  // in the kernel's source
};

class Shared {
 public:
  // `bytes` NaNs of every type, none of them written.
  void reset(uint32_t bytes, bool races) {
    races_ = races;
    bytes_.assign(bytes, 0xff);
    state_.assign(bytes, 0);
    if (races) shadow_.assign(bytes, Shadow{});
    last_foreign_ = 0;
  }

  uint32_t size() const { return static_cast<uint32_t>(bytes_.size()); }
  uint32_t last_foreign_read() const { return last_foreign_; }

  void load(void* to, uint32_t offset, uint32_t n, const Access& a) {
    check(offset, n, n);
    for (uint32_t i = offset; i < offset + n; i++)
      if (!(state_[i] & written))
        throw std::runtime_error("shared byte " + std::to_string(i) + " was never written");
    read(offset, n, a);
    std::memcpy(to, &bytes_[offset], n);
  }

  // A row of ldmatrix: may hold bytes that nobody wrote.
  void load_row(void* to, uint32_t offset, const Access& a) {
    check(offset, 16, 16);
    read(offset, 16, a);
    std::memcpy(to, &bytes_[offset], 16);
  }

  // By a thread of another block of the cluster.
  void load_foreign(void* to, uint32_t offset, uint32_t n, const Access& a) {
    check(offset, n, n);
    last_foreign_ = a.now;
    for (uint32_t i = offset; i < offset + n; i++) {
      if (!(state_[i] & written))
        throw std::runtime_error("byte " + std::to_string(i) +
                                 " of another block was never written");
      if (!races_) continue;
      Shadow& s = shadow_[i];
      if (state_[i] & pending) under_way(i, "read by another block");
      if (s.write_time >= a.cluster_synced)
        race(i, "read by another block", "written", s.write_thread, s.write_line, "cluster_sync");
      s.foreign_time = a.now;
    }
    std::memcpy(to, &bytes_[offset], n);
  }

  void store(const void* from, uint32_t offset, uint32_t n, const Access& a) {
    check(offset, n, n);
    if (races_)
      for (uint32_t i = offset; i < offset + n; i++) write(i, a, "written");
    put(from, offset, n);
  }

  // cp.async: the destination is nobody's from the issue to the wait.
  void copy_begin(uint32_t offset, uint32_t n, const Access& a, bool poison) {
    check(offset, n, n);
    for (uint32_t i = offset; i < offset + n; i++) {
      if (races_) write(i, a, "the target of copy_async");
      state_[i] |= pending;
      if (poison) bytes_[i] = 0xff;
    }
  }
  void copy_end(uint32_t offset, uint32_t n, const Access& a) {
    for (uint32_t i = offset; i < offset + n; i++) {
      state_[i] &= ~pending;
      if (races_) shadow_[i].wrote(a);
    }
  }

  // The data; nullptr: zeros.
  void put(const void* from, uint32_t offset, uint32_t n) {
    if (from) std::memcpy(&bytes_[offset], from, n);
    else std::memset(&bytes_[offset], 0, n);
    for (uint32_t i = offset; i < offset + n; i++) state_[i] |= written;
  }

 private:
  enum : uint8_t { written = 1, pending = 2 };
  static constexpr uint16_t several = 0xffff;  // warps

  // Enough to be exact. Of writers the last one: it was ordered behind those before it. Of readers
  // those since the block's last barrier: one warp with its lanes since the warp's last barrier, or
  // several.
  struct Shadow {
    uint32_t write_time = 0, read_time = 0, read_lanes = 0, foreign_time = 0;
    uint16_t write_thread = 0, write_line = 0, read_warp = 0, read_line = 0;

    void wrote(const Access& a) {
      write_time = a.now;
      write_thread = static_cast<uint16_t>(a.thread);
      write_line = static_cast<uint16_t>(a.line);
    }
    bool written_beside(const Access& a) const {
      return write_time >= a.block_synced && write_thread != a.thread &&
             (write_thread / 32 != a.warp || write_time >= a.warp_synced);
    }
    bool read_beside(const Access& a) const {
      return read_time >= a.block_synced &&
             (read_warp != a.warp || (read_time >= a.warp_synced && (read_lanes & ~a.lanes)));
    }
  };

  void check(uint32_t offset, uint32_t n, uint32_t alignment) const {
    if (offset >= size() || size() - offset < n)
      throw std::runtime_error(std::to_string(n) + " bytes at shared offset " +
                               std::to_string(static_cast<int32_t>(offset)) + " of " +
                               std::to_string(size()));
    if (offset % alignment)
      throw std::runtime_error("shared offset " + std::to_string(offset) + " is no multiple of " +
                               std::to_string(alignment));
  }

  void read(uint32_t offset, uint32_t n, const Access& a) {
    if (!races_) return;
    for (uint32_t i = offset; i < offset + n; i++) {
      Shadow& s = shadow_[i];
      if (state_[i] & pending) under_way(i, "read");
      if (s.written_beside(a))
        race(i, "read", "written", s.write_thread, s.write_line, barrier(s.write_thread / 32, a));
      if (s.read_time < a.block_synced) {
        s.read_warp = static_cast<uint16_t>(a.warp);
        s.read_lanes = a.lanes;
      } else if (s.read_warp != a.warp) {
        s.read_warp = several;
      } else {
        s.read_lanes = s.read_time < a.warp_synced ? a.lanes : s.read_lanes | a.lanes;
      }
      s.read_time = a.now;
      s.read_line = static_cast<uint16_t>(a.line);
    }
  }

  void write(uint32_t i, const Access& a, const char* verb) {
    Shadow& s = shadow_[i];
    if (state_[i] & pending) under_way(i, verb);
    if (s.written_beside(a))
      race(i, verb, "written", s.write_thread, s.write_line, barrier(s.write_thread / 32, a));
    if (s.read_beside(a)) race(i, verb, "read", -1, s.read_line, barrier(s.read_warp, a));
    if (s.foreign_time >= a.cluster_synced)
      race(i, verb, "read by another block", -1, 0, "cluster_sync");
    s.wrote(a);
  }

  static const char* barrier(int warp, const Access& a) {
    return warp == a.warp ? "sync_warp" : "sync_threads";
  }

  [[noreturn]] static void under_way(uint32_t i, const std::string& verb) {
    throw std::runtime_error("race: shared byte " + std::to_string(i) + " is " + verb +
                             " while a copy_async to it is under way");
  }
  [[noreturn]] static void race(uint32_t i, const std::string& verb, const std::string& earlier,
                                int thread, int line, const std::string& missing) {
    std::string by = thread < 0 ? " by another thread" : " by thread " + std::to_string(thread);
    if (line) by += " in line " + std::to_string(line);
    throw std::runtime_error("race: shared byte " + std::to_string(i) + " is " + verb +
                             ", and was " + earlier + by + ", without " + missing +
                             " between them");
  }

  bool races_ = true;
  std::vector<unsigned char> bytes_;
  std::vector<uint8_t> state_;
  std::vector<Shadow> shadow_;
  uint32_t last_foreign_ = 0;
};

}  // namespace casvit::cuda::emulation
