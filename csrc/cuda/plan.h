// How the kernels cut the maps: plain host C++, the same for every device's numbers and in the
// emulation.
#pragma once

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "backward_depthwise.h"
#include "backward_gate.h"
#include "launch.h"
#include "mixer.h"
#include "statistics.h"

namespace casvit::cuda {

struct Device {
  int multiprocessors;
  int shared_per_block;           // bytes that a block may ask for
  int shared_per_multiprocessor;  // bytes that the blocks on one share
};

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

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Warp-instructions of one block, counted from the machine code of sm_90 (bench/static): the mma
// sweeps, a granule of 8 bytes loaded, made into a, or stored.
inline double block_cost(Kernel kernel, const Maps& m, const Cut& c, int rows, bool halo) {
  const int lines = c.images * c.strips * rows;
  const auto sweeps = [&](int positions, int sweep_rows, double row, double start) {
    const int tiles = divide_up(positions, kPositions);
    const int groups = tiles < kWarps ? kWarps / tiles : 1;
    return divide_up(c.chunks, groups) * divide_up(tiles * groups, kWarps) * kWarps *
           (sweep_rows * row + start);
  };
  const auto granules = [&](int pairs, int extra_rows, double each) {
    return divide_up(2 * pairs * c.chunks, kThreads) * (kThreads / 32) *
           (lines + c.images * extra_rows) * each;
  };
  const int positions = c.images * c.strips * c.pairs;
  if (sums_taps(kernel)) {
    const bool combine = kernel == Kernel::kBackwardCombine;
    const int extra = halo ? 4 : 2, u_rows = halo ? rows + 1 : rows,
              wide = c.images * c.strips * (c.pairs + 1);
    return granules(c.pairs + 2, extra, combine ? 45 : 8) +
           (combine ? granules(c.pairs + 2, extra, 8) + granules(c.pairs + 1, 2, 8) : 0) +
           sweeps(wide, u_rows, combine ? 45 : 50, 60) + sweeps(wide, rows, combine ? 20 : 10, 60) +
           sweeps(positions, rows, 12, 30) + granules(c.pairs, 0, combine ? 70 : 45) + 4000;
  }
  if (kernel == Kernel::kCombine) {
    const int extra = halo ? 4 : 2, u_rows = halo ? rows + 1 : rows;
    return granules(c.pairs + 1, 2, 8) + granules(c.pairs + 2, extra, 45) +
           granules(c.pairs, 0, 8) + sweeps(c.images * c.strips * (c.pairs + 1), u_rows, 24, 30) +
           sweeps(positions, rows, 12, 30) + c.chunks * (m.channels / 16.0) * 14 +
           c.images * m.channels + 3000;
  }
  return granules(c.pairs + 1, 2, 8) +
         sweeps(positions, rows, kernel == Kernel::kGates ? 18 : 26, 40) +
         (kernel == Kernel::kGates ? c.chunks * lines * (c.pairs + 1) / 32.0 * 12 + 2000 : 1000);
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
           columns = columns < 8                                        ? columns + 1
                     : columns < half_width && columns * 2 > half_width ? half_width
                                                                        : columns * 2) {
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
            const uint32_t shared = shared_bytes(kernel, m, c, rows, halo);
            if (shared > static_cast<uint32_t>(device.shared_per_block)) break;
            int together = device.shared_per_multiprocessor / static_cast<int>(shared + kReserved);
            if (together < 1) together = 1;  // what a block may ask for fits
            if (together > 2) together = 2;  // registers
            const double blocks =
                static_cast<double>(c.bands) * c.columns * divide_up(m.images, images) * slices *
                (kernel == Kernel::kCombine || kernel == Kernel::kBackwardCombine ? 1 : 2);
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

inline int padded(int channels) { return divide_up(channels, kChunk) * kChunk; }

inline Maps maps(const Problem& p) {
  return {p.images, p.channels, padded(p.channels), p.height, p.width};
}

struct Plans {
  Plan gates, statistics, combine, backward_combine, backward_gate, backward_depthwise;
};

// Looked up in each call: worked out once for a shape and device. A copy: another thread may clear
// the table.
inline Plans plans(const Problem& p) {
  using Key = std::tuple<int, int, int, int, int, int, int>;
  static std::mutex mutex;
  static std::map<Key, Plans> known;
  const Key key{p.images,
                p.channels,
                p.height,
                p.width,
                p.multiprocessors,
                p.shared_per_block,
                p.shared_per_multiprocessor};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() > 4096) known.clear();  // sizes that change from batch to batch
  const Maps m = maps(p);
  const Device device{p.multiprocessors, p.shared_per_block, p.shared_per_multiprocessor};
  return known[key] = {
             plan(Kernel::kGates, m, device),        plan(Kernel::kStatistics, m, device),
             plan(Kernel::kCombine, m, device),      plan(Kernel::kBackwardCombine, m, device),
             plan(Kernel::kBackwardGate, m, device), plan(Kernel::kBackwardDepthwise, m, device)};
}

// One launch, or as many as the groups of images take. z: of the grid.
template <class Arguments>
const char* run(void (*kernel)(Arguments), const Problem& p, const Plan& plan, int z, Arguments a) {
  const int groups = divide_up(p.images, a.cut.images);
  for (int& first = a.cut.first_group; first < groups; first += most_groups) {
    const Grid blocks{a.cut.bands * a.cut.columns,
                      groups - first < most_groups ? groups - first : most_groups, z};
    if (const char* wrong = launch(kernel, blocks, kThreads, plan.shared, p.stream, a))
      return wrong;
  }
  return nullptr;
}

// Why these plans cannot run, or null.
inline const char* check(const Problem& p, std::initializer_list<const Plan*> found) {
  for (const Plan* plan : found)
    if (!plan->rows)
      return "a block of maps this wide, with this many channels, does not fit into the device's "
             "shared memory";
  if (static_cast<double>(p.images) * p.height * p.width >= 2147483648.0)
    return "expected fewer than 2^31 pixels";
  return nullptr;
}

}  // namespace casvit::cuda
