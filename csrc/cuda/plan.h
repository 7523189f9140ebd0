// How the kernels cut the maps: plain host C++, the same for every device's numbers and in the
// emulation.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <vector>

#include "backward_depthwise.h"
#include "backward_gate.h"
#include "launch.h"
#include "mixer.h"
#include "single_pass.h"
#include "statistics.h"

namespace casvit::cuda {

struct Device {
  int multiprocessors;
  int shared_per_block;           // bytes that a block may ask for
  int shared_per_multiprocessor;  // bytes that the blocks on one share
  int cluster;                    // blocks that may share theirs
};

// 8 blocks are what every device with clusters takes.
constexpr int most_cluster(int architecture) { return architecture >= 90 ? 8 : 1; }

// 0: as planned. 1 or 2: so many launches after the qkv product, for tests and measurements.
inline std::atomic<int> wanted_launches{0};

constexpr int kReserved = 1024;  // bytes of shared memory that the driver takes of each block's
// A warp of the gates' kernel holds the logits of its positions; the others go over many.
constexpr int most_positions(bool gates) { return kPositions * kWarps * (gates ? 1 : 4); }

// A kernel's cut, its rows (7 or 4), and what that costs.
struct Plan {
  Cut cut;
  int rows;
  bool halo;  // of combine
  uint32_t shared;
  double cost;  // estimated warp-instructions of a multiprocessor; infinite where nothing fits
  bool whole_image = false;  // of a cluster
};

enum class Kernel {
  kGates,
  kStatistics,
  kCombine,
  kBackwardCombine,
  kBackwardGate,
  kBackwardDepthwise
};

// All channels in a block: a sum goes over them.
constexpr bool takes_all_channels(Kernel k) {
  return k == Kernel::kGates || k == Kernel::kBackwardGate;
}
// Two convolutions after another: a block that has not all rows needs those around it twice over.
constexpr bool is_twofold(Kernel k) {
  return k == Kernel::kCombine || k == Kernel::kBackwardCombine || k == Kernel::kBackwardDepthwise;
}
// The whole width, 1, 2, 4 or 8 chunks.
constexpr bool sums_taps(Kernel k) {
  return k == Kernel::kBackwardCombine || k == Kernel::kBackwardDepthwise;
}

inline int divide_up(int a, int b) { return a / b + (a % b != 0); }

// Of a tile, at least. Sizes of the shared memory have 32 bits: to be asked before these, which of
// very wide maps or many channels would come out too small.
inline double tile_bytes(const Cut& c, int rows) {
  return static_cast<double>(c.images) * rows * c.pairs * c.chunks * kUnitBytes;
}

// Warp-instructions, counted from the machine code of sm_90 (bench/static). Of `walk`: a granule of
// 8 bytes loaded, made into a, or stored, `each`; a thread's column of an image.
inline double granules(const Cut& c, int pairs, int rows, double each) {
  const int across = c.chunks < kThreads ? kThreads / c.chunks : 1;
  return divide_up(2 * pairs, across) * kWarps * static_cast<double>(c.images) * (rows * each + 40);
}
// Of `convolve`, a sweep's row and its start.
inline double sweeps(const Cut& c, int positions, double rows, double row, double start) {
  const int tiles = divide_up(positions, kPositions), groups = tiles < kWarps ? kWarps / tiles : 1;
  return divide_up(c.chunks, groups) * divide_up(tiles * groups, kWarps) * kWarps *
         (rows * row + start);
}
// Of the sums of z s, for one of q and k.
inline double pooled_sums(const Cut& c, int own_rows) {
  return c.images * divide_up(c.chunks, 2) * (divide_up(own_rows * (c.pairs + 1), 32) * 25.0 + 128);
}
// Of the channels' gates and the means that they take.
inline double channel_gates_cost(const Maps& m, const Cut& c) {
  return c.chunks * (m.channels / 16.0 * 20 + 40) + c.images * m.channels * 2.0;
}

// Of one block of a kernel, with what stands outside of loops.
inline double block_cost(Kernel kernel, const Maps& m, const Cut& c, int rows, bool halo) {
  const int own = c.strips * rows, positions = c.images * c.strips * c.pairs;
  const int wide = c.images * c.strips * (c.pairs + 1);
  const int extra = halo ? 4 : 2, u_rows = halo ? rows + 1 : rows;
  if (sums_taps(kernel)) {
    const bool combine = kernel == Kernel::kBackwardCombine;
    return granules(c, c.pairs + 2, own + extra, combine ? 45 : 8) +
           (combine
                ? granules(c, c.pairs + 2, own + extra, 8) + granules(c, c.pairs + 1, own + 2, 8)
                : 0) +
           sweeps(c, wide, u_rows, combine ? 45 : 50, 60) +
           sweeps(c, wide, rows, combine ? 20 : 10, 60) + sweeps(c, positions, rows, 12, 30) +
           granules(c, c.pairs, own, combine ? 105 : 50) + 5000;
  }
  if (kernel == Kernel::kCombine)
    return granules(c, c.pairs + 1, own + 2, 8) + granules(c, c.pairs + 2, own + extra, 30) +
           granules(c, c.pairs, own, 8) + sweeps(c, wide, u_rows, 28, 30) +
           sweeps(c, positions, rows, 15, 30) + channel_gates_cost(m, c) + 4500;
  const bool gates = kernel == Kernel::kGates;
  return granules(c, c.pairs + 1, own + 2, 8) + sweeps(c, positions, rows, gates ? 19 : 26, 40) +
         (gates ? pooled_sums(c, own) + 4500 : 1500);
}

inline uint32_t shared_bytes(Kernel kernel, const Maps& m, const Cut& c, int rows, bool halo) {
  if (kernel == Kernel::kGates) return GatesShared(c, rows).bytes;
  if (kernel == Kernel::kBackwardGate) return BackwardGateShared(m, c, rows).bytes;
  if (kernel == Kernel::kBackwardCombine) return BackwardCombineShared(m, c, rows, halo).bytes;
  if (kernel == Kernel::kBackwardDepthwise) return BackwardDepthwiseShared(m, c, rows, halo).bytes;
  if (kernel == Kernel::kStatistics) return statistics_shared(c, rows);
  return CombineShared(m, c, rows, halo).bytes;
}

// The cheapest cut that fits.
inline Plan plan(Kernel kernel, const Maps& m, const Device& device) {
  Plan best{{}, 0, false, 0, 1e300};
  const int all = m.chunks(), half_width = divide_up(m.width, 2);
  const bool all_channels = takes_all_channels(kernel);
  const int most = most_positions(all_channels);
  std::vector<int> widths;  // of slices, in chunks
  if (sums_taps(kernel)) {
    for (int chunks = 1; chunks <= 8 && chunks < 2 * all; chunks *= 2) widths.push_back(chunks);
  } else {
    for (int slices = 1; slices <= (all_channels ? 1 : all);
         slices = slices < 8 ? slices + 1 : slices * 2)
      if (divide_up(all, divide_up(all, slices)) == slices)
        widths.push_back(divide_up(all, slices));
  }
  for (const int rows : {7, 4}) {
    for (int strips = 1; strips <= 16; ++strips) {
      const int own = rows * strips;
      if (own - rows >= m.height) break;
      const bool halo = own < m.height;
      if (is_twofold(kernel) && halo && strips != 2) continue;
      // Pairs of their own in the end, which need the least shared memory.
      for (int columns = 1; columns <= half_width;
           columns = columns < 8                 ? columns + 1
                     : columns <= half_width / 2 ? columns * 2
                     : columns < half_width      ? half_width
                                                 : half_width + 1) {
        const int pairs = divide_up(half_width, columns);
        if (strips * pairs > most || (sums_taps(kernel) && columns > 1)) continue;
        for (const int chunks : widths) {
          const int slices = divide_up(all, chunks);
          for (int images = 1; images <= m.images && images * strips * pairs <= most;
               images = images < 4 ? images + 1 : images * 2) {
            if (images > 1 && (halo || columns > 1)) break;
            if (images > 8 && kernel == Kernel::kCombine) break;  // rows of the channel gates' A
            Cut c{images,
                  strips,
                  pairs,
                  chunks,
                  divide_up(m.height, own),
                  divide_up(half_width, pairs),
                  chunks | 1};
            if (tile_bytes(c, own) > device.shared_per_block) break;
            const uint32_t shared = shared_bytes(kernel, m, c, rows, halo);
            if (shared > static_cast<uint32_t>(device.shared_per_block)) break;
            int together = device.shared_per_multiprocessor / static_cast<int>(shared + kReserved);
            if (together < 1) together = 1;  // what a block may ask for fits
            if (together > 2) together = 2;  // registers
            const double blocks =
                static_cast<double>(c.bands) * c.columns * divide_up(m.images, images) * slices *
                (kernel == Kernel::kCombine || kernel == Kernel::kBackwardCombine ? 1 : 2);
            if (blocks <= device.multiprocessors) together = 1;
            const double turns = divide_up(static_cast<int>(blocks < 1e9 ? blocks : 1e9),
                                           device.multiprocessors * together);
            const double cost = turns * together * block_cost(kernel, m, c, rows, halo) /
                                (together > 1 ? 0.9 : 0.65);
            if (cost < best.cost) best = {c, rows, halo, shared, cost};
          }
        }
      }
    }
  }
  return best;
}

// Warp-instructions of one block of a single pass.
inline double single_pass_cost(const Maps& m, const Cut& c, int rows) {
  const int tiles = divide_up(c.images * c.strips * c.pairs, kPositions);
  const int groups = 2 * tiles < kWarps ? kWarps / (2 * tiles) : 1;
  const int own = c.strips * rows, units = own * (c.pairs + 1);
  const int slices = divide_up(m.chunks(), c.chunks);
  const double logits = divide_up(c.chunks, groups) * divide_up(2 * tiles * groups, kWarps) *
                        kWarps * (rows * 19.0 + 40);
  return 4 * granules(c, c.pairs + 1, own + (c.bands > 1 ? 0 : 2), 8) + logits + 2500 * groups / 2 +
         (slices > 1 ? 4 * c.images * divide_up(units, 32) * (100.0 + 25 * slices) : 0) +
         2 * pooled_sums(c, own) + channel_gates_cost(m, c) +
         c.images * divide_up(units, kThreads / c.chunks) * kWarps * 64.0 +
         sweeps(c, c.images * c.strips * c.pairs, rows, 30, 40) +
         sweeps(c, c.images * c.strips * ((m.width + 2) / 2), rows, 17, 40) +
         (c.bands > 1 ? (c.pairs + 1) * c.unit_stride * 3.0 : 0) + 8500;
}

// The cheapest cut of a cluster whose blocks hold whole images together.
inline Plan plan_single_pass(const Maps& m, const Device& device, const SinglePassCut& only) {
  Plan best{{}, 0, false, 0, 1e300, true};
  const int all = m.chunks(), pairs = divide_up(m.width, 2);
  for (const int rows : {7, 4}) {
    for (int strips = 1; strips <= 16 && (strips - 1) * rows < m.height; ++strips) {
      const int bands = divide_up(m.height, strips * rows);
      for (int slices = 1; slices <= device.cluster / bands; ++slices) {
        const int chunks = divide_up(all, slices);
        if (divide_up(all, chunks) != slices || chunks > kThreads) continue;
        for (int images = 1; images <= m.images && images <= 8;  // rows of the channel gates' A
             ++images) {
          if (images > 1 && bands > 1) break;
          if (!only.allows(rows, strips, slices, images)) continue;
          const Cut c{images, strips, pairs, chunks, bands, 1, chunks | 1};
          if (2 * tile_bytes(c, strips * rows) > device.shared_per_block) break;
          const uint32_t shared = SinglePassShared(m, c, rows).bytes;
          if (shared > static_cast<uint32_t>(device.shared_per_block)) break;
          int together = device.shared_per_multiprocessor / static_cast<int>(shared + kReserved);
          together = together < 1 ? 1 : together > 2 ? 2 : together;  // registers
          const double blocks = static_cast<double>(bands) * slices * divide_up(m.images, images);
          if (blocks <= device.multiprocessors) together = 1;
          const double turns = divide_up(static_cast<int>(blocks < 1e9 ? blocks : 1e9),
                                         device.multiprocessors * together);
          const double cost =
              turns * together * single_pass_cost(m, c, rows) / (together > 1 ? 0.9 : 0.65);
          if (cost < best.cost) best = {c, rows, bands > 1, shared, cost, true};
        }
      }
    }
  }
  return best;
}

// Of a launch that reads and writes so many units of maps: bound by instructions, 80 % of four a
// cycle, or by memory, 13 bytes a cycle of a multiprocessor (H100: 3 TB/s); and the launch itself.
inline double cycles(const Plan& plan, double units, const Maps& m, const Device& device) {
  const double bytes = units * 2.0 * m.images * m.padded * m.height * m.width;
  const double issue = plan.cost / 3.2, memory = bytes / (device.multiprocessors * 13.0);
  return (issue > memory ? issue : memory) + 3000;
}

inline int padded(int channels) { return divide_up(channels, kChunk) * kChunk; }

inline Maps maps(const Problem& p) {
  return {p.images, p.channels, padded(p.channels), p.height, p.width};
}

struct Plans {
  Plan gates, statistics, combine, single_pass, backward_combine, backward_gate, backward_depthwise;
  bool prefers_single_pass;
  bool single_pass_first() const {
    const int wanted = wanted_launches;
    return wanted ? wanted == 1 : prefers_single_pass;
  }
};

// Looked up in each call: worked out once for a shape and device. A copy: another thread may clear
// the table.
inline Plans plans(const Problem& p) {
  using Key = std::array<int, 12>;
  static std::mutex mutex;
  static std::map<Key, Plans> known;
  const Key key{p.images,
                p.channels,
                p.height,
                p.width,
                p.multiprocessors,
                p.shared_per_block,
                p.shared_per_multiprocessor,
                p.cluster,
                p.only.rows,
                p.only.strips,
                p.only.slices,
                p.only.images};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() > 4096) known.clear();  // sizes that change from batch to batch
  const Maps m = maps(p);
  const Device device{p.multiprocessors, p.shared_per_block, p.shared_per_multiprocessor,
                      p.cluster};
  Plans of{plan(Kernel::kGates, m, device),
           plan(Kernel::kStatistics, m, device),
           plan(Kernel::kCombine, m, device),
           plan_single_pass(m, device, p.only),
           plan(Kernel::kBackwardCombine, m, device),
           plan(Kernel::kBackwardGate, m, device),
           plan(Kernel::kBackwardDepthwise, m, device),
           false};
  of.prefers_single_pass =
      of.single_pass.rows && cycles(of.single_pass, 4, m, device) <=
                                 cycles(of.gates, 2, m, device) + cycles(of.combine, 4, m, device);
  return known[key] = of;
}

// One launch, or as many as the groups of images take. z: of the grid.
// cluster: blocks across, where these share their memory.
template <class Arguments>
const char* run(void (*kernel)(Arguments), const Problem& p, const Plan& plan, int z, Arguments a,
                int cluster = 0) {
  const int groups = divide_up(p.images, a.cut.images);
  for (int& first = a.cut.first_group; first < groups; first += most_groups) {
    const Grid blocks{cluster ? cluster : a.cut.bands * a.cut.columns,
                      groups - first < most_groups ? groups - first : most_groups, z};
    if (const char* wrong =
            launch(kernel, blocks, kThreads, plan.shared, p.stream, a, cluster ? cluster : 1))
      return wrong;
  }
  return nullptr;
}

// Why these plans cannot run, or null.
inline const char* check(const Problem& p, std::initializer_list<const Plan*> found) {
  for (const Plan* plan : found)
    if (!plan->rows && plan->whole_image)
      return "the shared memory of a cluster does not hold an image of this size";
    else if (!plan->rows)
      return "a block of maps this wide, with this many channels, does not fit into the device's "
             "shared memory";
  if (static_cast<double>(p.images) * p.height * p.width >= 2147483648.0)
    return "expected fewer than 2^31 pixels";
  return nullptr;
}

}  // namespace casvit::cuda
