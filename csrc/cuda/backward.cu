// Kernels of the backward, and their launches for mixer.h. Also compiled by the emulation.
#include "launch.h"
#include "mixer.h"
#include "plan.h"

namespace casvit::cuda {

template <class T>
CASVIT_KERNEL(kPackThreads, 1)
backward_pack_kernel(CASVIT_PARAMETER PackArguments a) {
  backward_pack_block<T>(a);
}
template <class T, int ROWS, bool HALO>
CASVIT_KERNEL(kThreads, 2)
backward_combine_kernel(CASVIT_PARAMETER BackwardCombineArguments a) {
  backward_combine_block<T, ROWS, HALO>(a);
}
template <class T, int ROWS>
CASVIT_KERNEL(kThreads, 2)
backward_gate_kernel(CASVIT_PARAMETER BackwardGateArguments a) {
  backward_gate_block<T, ROWS>(a);
}
template <class T, int ROWS, bool HALO>
CASVIT_KERNEL(kThreads, 2)
backward_depthwise_kernel(CASVIT_PARAMETER BackwardDepthwiseArguments a) {
  backward_depthwise_block<T, ROWS, HALO>(a);
}

namespace {

int blocks(const Problem& p, const Cut& c) {
  return c.bands * c.columns * divide_up(p.images, c.images);
}
int slices(const Maps& m, const Cut& c) { return divide_up(m.chunks(), c.chunks); }

template <class T>
const char* run_combine(const Problem& p, const Plan& plan, const BackwardCombineArguments& a) {
  const auto kernel = plan.halo ? (plan.rows == 7 ? backward_combine_kernel<T, 7, true>
                                                  : backward_combine_kernel<T, 4, true>)
                                : (plan.rows == 7 ? backward_combine_kernel<T, 7, false>
                                                  : backward_combine_kernel<T, 4, false>);
  return run(kernel, p, plan, slices(a.forward.maps, plan.cut), a);
}

template <class T>
const char* run_gate(const Problem& p, const Plan& plan, const BackwardGateArguments& a) {
  return run(plan.rows == 7 ? backward_gate_kernel<T, 7> : backward_gate_kernel<T, 4>, p, plan, 2,
             a);
}

template <class T>
const char* run_depthwise(const Problem& p, const Plan& plan, const BackwardDepthwiseArguments& a) {
  const auto kernel = plan.halo ? (plan.rows == 7 ? backward_depthwise_kernel<T, 7, true>
                                                  : backward_depthwise_kernel<T, 4, true>)
                                : (plan.rows == 7 ? backward_depthwise_kernel<T, 7, false>
                                                  : backward_depthwise_kernel<T, 4, false>);
  return run(kernel, p, plan, 2 * slices(a.maps, plan.cut), a);
}

}  // namespace

const char* backward_parts(const Problem& p, BackwardParts* found) {
  const Plans of = plans(p);
  if (const char* wrong =
          check(p, {&of.backward_combine, &of.backward_gate, &of.backward_depthwise}))
    return wrong;
  const Cut &c = of.backward_combine.cut, &g = of.backward_gate.cut, &d = of.backward_depthwise.cut;
  *found = {slices(maps(p), c), c.bands, blocks(p, c), blocks(p, g), blocks(p, d)};
  return nullptr;
}

int64_t backward_packed_words(int channels) { return BackwardLayout(padded(channels)).end; }

const char* pack_backward(const Problem& p, const Weights& weights, const float* statistics,
                          const float (&eps)[2], void* packed) {
  const PackArguments a{weights,    statistics,         {eps[0], eps[1]},
                        p.channels, padded(p.channels), static_cast<uint4*>(packed)};
  const Grid at{a.padded / kChunk, 7, 1};
  return p.float16 ? launch(backward_pack_kernel<Fp16>, at, kPackThreads, 0, p.stream, a)
                   : launch(backward_pack_kernel<Bf16>, at, kPackThreads, 0, p.stream, a);
}

const char* backward_combine(const Problem& p, const void* qkv, const void* packed,
                             const float* spatial, const float* gates, const void* grad,
                             void* grad_qkv, void* grad_sum, float* pixel, float* channel_sums,
                             float* weights) {
  const Plan plan = plans(p).backward_combine;
  if (const char* wrong = check(p, {&plan})) return wrong;
  BackwardCombineArguments a{};
  a.forward.maps = maps(p);
  a.cut = plan.cut;
  a.forward.qkv = static_cast<const uint16_t*>(qkv);
  a.forward.spatial = spatial;
  a.packed = static_cast<const uint4*>(packed);
  a.gates = gates;
  a.grad = static_cast<const uint16_t*>(grad);
  a.grad_qkv = static_cast<uint16_t*>(grad_qkv);
  a.grad_sum = static_cast<uint16_t*>(grad_sum);
  a.pixel = pixel;
  a.channel_sums = channel_sums;
  a.weights = weights;
  return p.float16 ? run_combine<Fp16>(p, plan, a) : run_combine<Bf16>(p, plan, a);
}

const char* backward_gate(const Problem& p, const void* qkv, const void* packed,
                          const float* spatial, const float* pixel, const float* shift,
                          float* logit, float* sums) {
  const Plan plan = plans(p).backward_gate;
  if (const char* wrong = check(p, {&plan})) return wrong;
  const BackwardGateArguments a{maps(p),
                                plan.cut,
                                static_cast<const uint16_t*>(qkv),
                                static_cast<const uint4*>(packed),
                                spatial,
                                pixel,
                                shift,
                                logit,
                                sums};
  return p.float16 ? run_gate<Fp16>(p, plan, a) : run_gate<Bf16>(p, plan, a);
}

const char* backward_depthwise(const Problem& p, const void* qkv, const void* packed,
                               const float* spatial, const float* logit, const float* gates,
                               const float* shift, const float* coefficients, const void* grad_sum,
                               void* grad_qkv, float* weights) {
  const Plan plan = plans(p).backward_depthwise;
  if (const char* wrong = check(p, {&plan})) return wrong;
  const BackwardDepthwiseArguments a{maps(p),
                                     plan.cut,
                                     static_cast<const uint16_t*>(qkv),
                                     static_cast<const uint4*>(packed),
                                     spatial,
                                     logit,
                                     gates,
                                     shift,
                                     coefficients,
                                     static_cast<const uint16_t*>(grad_sum),
                                     static_cast<uint16_t*>(grad_qkv),
                                     weights};
  return p.float16 ? run_depthwise<Fp16>(p, plan, a) : run_depthwise<Bf16>(p, plan, a);
}

}  // namespace casvit::cuda
