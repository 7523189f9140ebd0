// Kernels, and the launches of mixer.h. Also compiled by the emulation, as host C++.
#include "mixer.h"

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "launch.h"
#include "plan.h"

namespace casvit::cuda {

template <class T>
CASVIT_KERNEL(kPackThreads, 1)
pack_kernel(CASVIT_PARAMETER PackArguments a) {
  pack_block<T>(a);
}
template <class T, int ROWS>
CASVIT_KERNEL(kThreads, 2)
gates_kernel(CASVIT_PARAMETER GatesArguments a) {
  gates_block<T, ROWS>(a);
}
template <class T, int ROWS>
CASVIT_KERNEL(kThreads, 2)
statistics_kernel(CASVIT_PARAMETER StatisticsArguments a) {
  statistics_block<T, ROWS>(a);
}
CASVIT_KERNEL(kThreads, 1) merge_kernel(CASVIT_PARAMETER MergeArguments a) { merge_block(a); }
template <class T, int ROWS, bool HALO>
CASVIT_KERNEL(kThreads, 2)
combine_kernel(CASVIT_PARAMETER CombineArguments a) {
  combine_block<T, ROWS, HALO>(a);
}

namespace {

int padded(int channels) { return (channels + kChunk - 1) / kChunk * kChunk; }

Maps maps(const Problem& p) {
  return {p.images, p.channels, padded(p.channels), p.height, p.width};
}

const char* kTooLarge =
    "a block of this many channels does not fit into the device's shared memory";
const char* kTooMany = "2^31 pixels or more";

struct Plans {
  Plan gates, statistics, combine;
};

// Looked up in each call: worked out once for a shape and device. A copy: another thread may clear
// the table.
Plans plans(const Problem& p) {
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
  return known[key] = {plan(Kernel::kGates, m, device), plan(Kernel::kStatistics, m, device),
                       plan(Kernel::kCombine, m, device)};
}

const char* check(const Problem& p, const Plans& found) {
  if (!found.gates.rows || !found.statistics.rows || !found.combine.rows) return kTooLarge;
  return static_cast<double>(p.images) * p.height * p.width >= 2147483648.0 ? kTooMany : nullptr;
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

template <class T>
const char* run_pack(const Problem& p, const PackArguments& a) {
  return launch(pack_kernel<T>, Grid{a.padded / kChunk, 4, 1}, kPackThreads, 0, p.stream, a);
}

template <class T>
const char* run_statistics(const Problem& p, const Plan& plan, const StatisticsArguments& a) {
  return run(plan.rows == 7 ? statistics_kernel<T, 7> : statistics_kernel<T, 4>, p, plan,
             2 * a.slices(), a);
}

template <class T>
const char* run_gates(const Problem& p, const Plan& plan, const GatesArguments& a) {
  return run(plan.rows == 7 ? gates_kernel<T, 7> : gates_kernel<T, 4>, p, plan, 2, a);
}

template <class T>
const char* run_combine(const Problem& p, const Plan& plan, const CombineArguments& a) {
  const auto kernel =
      plan.halo ? (plan.rows == 7 ? combine_kernel<T, 7, true> : combine_kernel<T, 4, true>)
                : (plan.rows == 7 ? combine_kernel<T, 7, false> : combine_kernel<T, 4, false>);
  return run(kernel, p, plan, divide_up(a.maps.chunks(), plan.cut.chunks), a);
}

}  // namespace

#ifndef CASVIT_EMULATED
const char* look_at_device(int device, Problem* p) {
  const std::pair<cudaDeviceAttr, int*> wanted[] = {
      {cudaDevAttrMultiProcessorCount, &p->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &p->shared_per_block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &p->shared_per_multiprocessor},
  };
  for (const auto& [attribute, value] : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return what(error);
  }
  return nullptr;
}
#endif

int64_t packed_words(int channels) { return PackedLayout(channels, padded(channels)).end; }

const char* parts(const Problem& p, Parts* found) {
  const Plans of = plans(p);
  const Cut &g = of.gates.cut, &s = of.statistics.cut;
  if (const char* wrong = check(p, of)) return wrong;
  *found = {g.bands * g.columns, s.bands * s.columns * divide_up(p.images, s.images)};
  return nullptr;
}

const char* pack(const Problem& p, const Weights& weights, const float* statistics,
                 const float (&eps)[2], void* packed) {
  const PackArguments a{weights,    statistics,         {eps[0], eps[1]},
                        p.channels, padded(p.channels), static_cast<uint4*>(packed)};
  return p.float16 ? run_pack<Fp16>(p, a) : run_pack<Bf16>(p, a);
}

const char* statistics(const Problem& p, const void* qkv, const void* packed, float* counts,
                       float* moments, float* result) {
  const Plans of = plans(p);
  if (const char* wrong = check(p, of)) return wrong;
  const Plan& plan = of.statistics;
  const StatisticsArguments a{
      maps(p), plan.cut, static_cast<const uint16_t*>(qkv), static_cast<const uint4*>(packed),
      counts,  moments};
  if (const char* wrong =
          p.float16 ? run_statistics<Fp16>(p, plan, a) : run_statistics<Bf16>(p, plan, a))
    return wrong;
  const int blocks = plan.cut.bands * plan.cut.columns * divide_up(p.images, plan.cut.images);
  const MergeArguments merge{counts, moments, result, blocks, p.channels, padded(p.channels)};
  return launch(merge_kernel, Grid{divide_up(p.channels, kWarps), 2, 1}, kThreads, 0, p.stream,
                merge);
}

const char* mix(const Problem& p, const void* qkv, const void* packed, float* sums, float* spatial,
                float* pooled, float* channel, void* out, bool channels_last) {
  const Plans of = plans(p);
  if (const char* wrong = check(p, of)) return wrong;
  const Maps m = maps(p);
  const uint16_t* maps_of_qkv = static_cast<const uint16_t*>(qkv);
  const uint4* words = static_cast<const uint4*>(packed);
  const GatesArguments gates{m, of.gates.cut, maps_of_qkv, words, spatial, sums};
  if (const char* wrong =
          p.float16 ? run_gates<Fp16>(p, of.gates, gates) : run_gates<Bf16>(p, of.gates, gates))
    return wrong;
  const int parts = of.gates.cut.bands * of.gates.cut.columns;
  const CombineArguments combine{m,
                                 of.combine.cut,
                                 maps_of_qkv,
                                 words,
                                 spatial,
                                 sums,
                                 parts,
                                 pooled,
                                 channel,
                                 static_cast<uint16_t*>(out),
                                 channels_last};
  return p.float16 ? run_combine<Fp16>(p, of.combine, combine)
                   : run_combine<Bf16>(p, of.combine, combine);
}

}  // namespace casvit::cuda

// What Python asks before any call, through ctypes.
#ifndef CASVIT_EMULATED
#define CASVIT_EXPORT extern "C" __attribute__((visibility("default")))
#define CASVIT_TEXT(number) CASVIT_TEXT_OF(number)
#define CASVIT_TEXT_OF(number) #number
CASVIT_EXPORT const char* casvit_cuda_architectures() { return CASVIT_CUDA_NAMES; }
CASVIT_EXPORT const char* casvit_cuda_version() {
  return CASVIT_TEXT(__CUDACC_VER_MAJOR__) "." CASVIT_TEXT(__CUDACC_VER_MINOR__) "." CASVIT_TEXT(
      __CUDACC_VER_BUILD__);
}
CASVIT_EXPORT int casvit_cuda_runtime() { return CUDART_VERSION; }
CASVIT_EXPORT int casvit_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif
