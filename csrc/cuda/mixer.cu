// Kernels, and the launches of mixer.h. Also compiled by the emulation, as host C++.
#include "mixer.h"

#include <utility>

#include "describe.h"
#include "launch.h"
#include "plan.h"
#include "single_pass.h"

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
template <class T, int ROWS>
CASVIT_KERNEL(kThreads, 2)
single_pass_kernel(CASVIT_PARAMETER SinglePassArguments a) {
  single_pass_block<T, ROWS>(a);
}

namespace {

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

template <class T>
const char* run_single_pass(const Problem& p, const Plan& plan, const SinglePassArguments& a) {
  const int blocks = plan.cut.bands * divide_up(a.maps.chunks(), plan.cut.chunks);
  return run(plan.rows == 7 ? single_pass_kernel<T, 7> : single_pass_kernel<T, 4>, p, plan, 1, a,
             blocks);
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
  // By the code that runs there, not by the device: it may be compiled by the driver from older
  // PTX.
  const auto kernel = single_pass_kernel<Bf16, 7>;
  cudaFuncAttributes of{};
  const cudaError_t error = cudaFuncGetAttributes(&of, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return what(error);
  p->cluster = most_cluster(of.ptxVersion);
  // Not where a part of a device (MIG) has no room for so many of the largest blocks together.
  for (; p->cluster > 1; p->cluster /= 2) {
    cudaLaunchAttribute attribute = cluster_of(p->cluster);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(p->cluster);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = p->shared_per_block;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int together = 0;
    if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             p->shared_per_block) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&together, kernel, &config) == cudaSuccess && together > 0)
      break;
    cudaGetLastError();  // nobody else's
  }
  return nullptr;
}
#endif

int64_t packed_words(int channels) { return PackedLayout(channels, padded(channels)).end; }

const char* parts(const Problem& p, Parts* found) {
  const Plans of = plans(p);
  const Cut &g = of.gates.cut, &s = of.statistics.cut;
  if (const char* wrong = check(p, {&of.gates, &of.statistics})) return wrong;
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
  if (const char* wrong = check(p, {&of.statistics})) return wrong;
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

bool is_single_pass(const Problem& p) { return plans(p).single_pass_first(); }

const char* mix(const Problem& p, const void* qkv, const void* packed, float* sums, float* spatial,
                float* pooled, float* channel, void* out, bool channels_last) {
  const Plans of = plans(p);
  const Maps m = maps(p);
  const uint16_t* maps_of_qkv = static_cast<const uint16_t*>(qkv);
  const uint4* words = static_cast<const uint4*>(packed);
  if (of.single_pass_first()) {
    if (const char* wrong = check(p, {&of.single_pass})) return wrong;
    const SinglePassArguments a{
        m,       of.single_pass.cut,          maps_of_qkv,  words, spatial, pooled,
        channel, static_cast<uint16_t*>(out), channels_last};
    return p.float16 ? run_single_pass<Fp16>(p, of.single_pass, a)
                     : run_single_pass<Bf16>(p, of.single_pass, a);
  }
  if (const char* wrong = check(p, {&of.gates, &of.combine})) return wrong;
  if (!sums || !spatial)  // `wanted_launches` may have changed since `is_single_pass`
    return "expected buffers for two launches, got those for one: it changed during the call";
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
// problem: images, channels, height, width, multiprocessors, shared memory of a block and of a
// multiprocessor, blocks of a cluster. JSON; the thread's own until its next call.
CASVIT_EXPORT const char* casvit_cuda_plan(const int* problem) {
  static thread_local std::string text;
  text = casvit::cuda::describe({problem[0], problem[1], problem[2], problem[3], false, problem[4],
                                 problem[5], problem[6], problem[7], nullptr});
  return text.c_str();
}
CASVIT_EXPORT void casvit_cuda_launches(int wanted) { casvit::cuda::wanted_launches = wanted; }
CASVIT_EXPORT int casvit_cuda_runtime() { return CUDART_VERSION; }
CASVIT_EXPORT int casvit_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif
