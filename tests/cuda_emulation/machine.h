// One cluster of blocks at a time: its threads as fibers, their meetings, and who runs next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"
#include "memory.h"
#include "shared.h"

namespace casvit::cuda::emulation {

struct Grid {
  int x = 1, y = 1, z = 1;
};

struct Shape {
  Grid grid;
  int threads;            // of a block, a multiple of 32
  uint32_t shared_bytes;  // of a block
  int cluster = 1;        // blocks, along x
};

struct Settings {
  // 0: lanes in turn, copy_async at once. 1: random order, also between accesses; copy_async at the
  // wait for it. 2: blocks and warps from the last, each as far as it can; copy_async at once.
  int schedule = 0;
  uint64_t seed = 0;
  bool races = true;
  std::string skip;  // a barrier's or wait's name as in Report::sites: it does nothing
};

struct Report {
  std::string kernel;
  std::vector<Memory::Buffer> traffic;  // of this launch alone
  std::vector<std::string> sites;       // barriers and waits that the launch came across
};

struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

enum class At : uint8_t { ready, warp, block, cluster, done };

struct Block;

struct Warp {
  int arrived = 0;
  const char* what = "";
  Site site{"", 0};
  void* arguments[32];
  uint32_t synced = 0;
  int in_block_barrier = 0;
  Site block_site{"", 0};
};

struct Copy {
  uint32_t offset, bytes;
  const void* from;  // nullptr: zeros
  int group;
};

struct Thread {
  int index = 0, lane = 0;  // in the block, in the warp
  Block* block = nullptr;
  Warp* warp = nullptr;
  At at = At::ready;
  const char* what = "";  // what it does or last did
  Site site{"", 0};
  int group = 0;  // of copies that comes next
  std::vector<Copy> copies;
};

struct Block {
  int x = 0, y = 0, z = 0, rank = 0;
  Shared shared;
  std::vector<Warp> warps;
  int arrived = 0, ended = 0;
  uint32_t synced = 0;

  std::string name() const {
    return "block (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) +
           ")";
  }
};

class Machine {
 public:
  static inline Machine* running = nullptr;  // one launch at a time

  Machine(const std::string& name, const std::function<void()>& kernel, const Shape& shape,
          Memory& memory, const Settings& settings)
      : memory(memory), settings(settings), name_(name), kernel_(kernel), shape_(shape) {
    if (shape.threads < 32 || shape.threads > 1024 || shape.threads % 32)
      reject("threads: a multiple of 32 up to 1024");
    if (shape.shared_bytes > 232448) reject("a block has at most 232448 bytes of shared memory");
    if (shape.cluster < 1 || shape.cluster > 16 || shape.grid.x % shape.cluster)
      reject("the cluster, 1 to 16 blocks, divides the grid along x");
    if (settings.schedule < 0 || settings.schedule > 2) reject("schedules are 0, 1 and 2");
    if (running) reject("another launch is under way");
  }

  Report run() {
    const std::vector<Memory::Buffer> before = memory.buffers();
    memory.begin_launch();
    running = this;
    struct Reset {
      ~Reset() { running = nullptr; }
    } reset;
    const Grid g = shape_.grid;
    std::vector<int> order(static_cast<size_t>(g.x / shape_.cluster) * g.y * g.z);
    for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
    if (settings.schedule == 1) shuffle(order);
    if (settings.schedule == 2) std::reverse(order.begin(), order.end());
    for (const int i : order) {
      const int across = g.x / shape_.cluster;
      run_cluster(i % across * shape_.cluster, i / across % g.y, i / across / g.y);
    }
    Report report{name_, memory.buffers(), {}};
    for (size_t i = 0; i < before.size(); i++) {
      report.traffic[i].read -= before[i].read;
      report.traffic[i].written -= before[i].written;
    }
    for (const Met& met : sites_) report.sites.push_back(met.text);
    return report;
  }

  // --- For the device's functions, which run in a thread.
  Thread& thread() { return *current_; }
  Block& block(int rank) {
    if (rank < 0 || rank >= shape_.cluster)
      throw std::runtime_error("rank " + std::to_string(rank) + " of a cluster of " +
                               std::to_string(shape_.cluster));
    return blocks_[rank];
  }

  // Says what the thread does now, for error messages.
  Thread& doing(const char* what, const char* file, int line) {
    current_->what = what;
    current_->site = {file, line};
    return *current_;
  }

  Access access(uint32_t lanes) const {
    const Thread& t = *current_;
    const uint32_t block = std::max(t.block->synced, cluster_synced_);
    return {t.index,        t.index / 32, lanes,           clock_,
            t.warp->synced, block,        cluster_synced_, t.site.line};
  }
  Access access() const { return access(1u << current_->lane); }
  Access access_of_warp() const {
    Access a = access(0xffffffffu);
    a.thread = -1;
    return a;
  }

  // The random schedule stops a thread before some of its accesses.
  void maybe_preempt() {
    if (settings.schedule == 1 && random() % 16 == 0) fibers_.pause();
  }

  // Notes a barrier or wait. True where it is to be skipped.
  bool skipped() {
    for (const auto& met : sites_)
      if (met.site == current_->site && std::strcmp(met.what, current_->what) == 0) return met.skip;
    const std::string text = std::string(current_->what) + " " + current_->site.text();
    sites_.push_back({current_->what, current_->site, text, text == settings.skip});
    return sites_.back().skip;
  }

  // All 32 lanes come to one place; the last one calls finish(arguments of the lanes).
  template <class Arguments, class Finish>
  void meet_warp(Arguments& mine, Finish finish) {
    Thread& t = *current_;
    Warp& w = *t.warp;
    if (w.arrived == 0) {
      w.what = t.what;
      w.site = t.site;
    } else if (!(w.site == t.site) || (w.what != t.what && std::strcmp(w.what, t.what) != 0)) {
      throw std::runtime_error("the warp has diverged: other lanes wait in " + std::string(w.what) +
                               " (" + w.site.text() + ")");
    }
    w.arguments[t.lane] = &mine;
    if (++w.arrived < 32) return wait(At::warp);
    w.arrived = 0;
    finish(reinterpret_cast<Arguments* const*>(w.arguments));
    free_threads(&t - t.lane, 32);
  }
  void warp_synced() { current_->warp->synced = ++clock_; }

  void meet_block() {
    Thread& t = *current_;
    Block& b = *t.block;
    same_site_in_warp(t);
    if (++b.arrived < shape_.threads) return wait(At::block);
    b.arrived = 0;
    b.synced = ++clock_;
    Thread* first = &t - t.index;
    for (Warp& w : b.warps) w.in_block_barrier = 0;
    free_threads(first, shape_.threads);
  }

  void meet_cluster() {
    same_site_in_warp(*current_);
    if (++in_cluster_barrier_ < static_cast<int>(threads_.size())) return wait(At::cluster);
    in_cluster_barrier_ = 0;
    cluster_synced_ = ++clock_;
    for (Block& b : blocks_)
      for (Warp& w : b.warps) w.in_block_barrier = 0;
    free_threads(threads_.data(), shape_.threads * shape_.cluster);
  }

  Memory& memory;
  const Settings settings;

 private:
  struct Met {
    const char* what;
    Site site;
    std::string text;
    bool skip;
  };

  [[noreturn]] void reject(const std::string& why) const {
    throw std::runtime_error("kernel " + name_ + ": " + why);
  }

  void wait(At where) {
    current_->at = where;
    fibers_.pause();
  }

  void free_threads(Thread* first, int count) {
    for (int i = 0; i < count; i++) first[i].at = At::ready;
  }

  void same_site_in_warp(const Thread& t) {
    Warp& w = *t.warp;
    if (w.in_block_barrier++ == 0) w.block_site = t.site;
    else if (!(w.block_site == t.site))
      throw std::runtime_error("the warp has diverged: other lanes wait in " + w.block_site.text());
  }

  // What a fiber runs.
  static void enter() {
    Machine& m = *running;
    try {
      m.kernel_();
    } catch (const std::exception& e) {
      const Thread& t = *m.current_;
      m.error_ = t.block->name() + ", thread " + std::to_string(t.index) + ", " + t.what + " (" +
                 t.site.text() + "): " + e.what();
    }
    m.current_->at = At::done;
    m.ended(*m.current_->block);
    m.fibers_.pause();
  }

  void ended(Block& b) {
    if (++b.ended == shape_.threads && error_.empty() &&
        b.shared.last_foreign_read() >= cluster_synced_ && settings.races &&
        b.shared.last_foreign_read())
      error_ = b.name() + " ends without cluster_sync after another block read its shared memory";
  }

  void run_cluster(int x, int y, int z) {
    const int threads = shape_.threads;
    clock_ = cluster_synced_ = 1;
    in_cluster_barrier_ = 0;
    blocks_.resize(shape_.cluster);
    threads_.assign(static_cast<size_t>(threads) * shape_.cluster, Thread{});
    for (int rank = 0; rank < shape_.cluster; rank++) {
      Block& b = blocks_[rank];
      b.x = x + rank, b.y = y, b.z = z, b.rank = rank;
      b.shared.reset(shape_.shared_bytes, settings.races);
      b.warps.assign(threads / 32, Warp{});
      b.arrived = b.ended = 0;
      b.synced = 1;
      for (int i = 0; i < threads; i++) {
        Thread& t = threads_[rank * threads + i];
        t.index = i, t.lane = i % 32, t.block = &b, t.warp = &b.warps[i / 32];
      }
    }
    fibers_.reset(static_cast<int>(threads_.size()), enter);
    std::vector<int> order(threads_.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
    if (settings.schedule == 2) std::reverse(order.begin(), order.end());
    while (true) {
      if (settings.schedule == 1) shuffle(order);
      bool moved = false;
      for (size_t i = 0; i < order.size();
           i += 32) {  // the threads of a warp, in schedules 0 and 2
        bool again = true;
        while (again) {
          again = false;
          for (size_t j = i; j < i + 32; j++) again |= step(order[j]);
          moved |= again;
          if (settings.schedule != 2) break;
        }
      }
      if (!moved) break;
    }
    for (const Thread& t : threads_)
      if (t.at != At::done) reject(deadlock());
  }

  // Runs a thread until it waits. False where it cannot run.
  bool step(int i) {
    if (threads_[i].at != At::ready) return false;
    current_ = &threads_[i];
    fibers_.resume(i);
    if (!error_.empty()) reject(error_);
    return true;
  }

  std::string deadlock() const {
    std::string text = "deadlock";
    for (size_t i = 0, next; i < threads_.size(); i = next) {
      const Thread& t = threads_[i];
      for (next = i + 1; next < threads_.size(); next++) {
        const Thread& u = threads_[next];
        if (u.block != t.block || u.at != t.at) break;
        if (t.at != At::done && !(u.site == t.site)) break;
      }
      text += i ? "; " : ": ";
      text += t.block->name() + ", threads " + std::to_string(t.index) + " to " +
              std::to_string(threads_[next - 1].index);
      text += t.at == At::done ? " have ended"
                               : " wait in " + std::string(t.what) + " (" + t.site.text() + ")";
    }
    return text;
  }

  uint64_t random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_ >> 11;
  }
  void shuffle(std::vector<int>& v) {
    for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[random() % i]);
  }

  static inline Fibers fibers_;  // stacks are kept from launch to launch

  const std::string name_;
  const std::function<void()>& kernel_;
  const Shape shape_;
  std::vector<Thread> threads_;
  std::vector<Block> blocks_;
  std::vector<Met> sites_;
  Thread* current_ = nullptr;
  std::string error_;
  uint32_t clock_ = 1, cluster_synced_ = 1;
  int in_cluster_barrier_ = 0;
  uint64_t random_ = settings.seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
};

// Runs all blocks. `kernel` calls the kernel with its arguments.
inline Report launch(const std::string& name, const std::function<void()>& kernel,
                     const Shape& shape, Memory& memory, const Settings& settings) {
  return Machine(name, kernel, shape, memory, settings).run();
}

}  // namespace casvit::cuda::emulation
