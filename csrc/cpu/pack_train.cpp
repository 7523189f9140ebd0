#include <cstring>
#include <initializer_list>

#include "cpu/pack.h"
#include "cpu/packed_layout.h"
#include "cpu/scratch.h"

namespace casvit {
namespace {

thread_local Buffer training_buffer;

void* zeroed(int64_t bytes) {
  void* to = training_buffer.get(bytes);
  std::memset(to, 0, static_cast<size_t>(bytes));
  return to;
}

}  // namespace

WeightsView pack_qkv(const Kernels& k, int64_t C, const Source& weight, const Source& bias,
                     Precision precision, const ThreadPool& pool) {
  const QkvLayout layout(k, C, precision, 0, false);
  void* to = training_buffer.get(layout.end);
  std::memset(floats(to, layout.bias), 0, static_cast<size_t>(layout.end - layout.bias));
  const float* matrix = fill_qkv(k, C, weight, bias, precision, layout, to, pool);
  WeightsView v{};
  view_qkv(layout, to, v);
  v.matrix = matrix;
  return v;
}

WeightsView pack_mixing(const Kernels& k, const Sources& s, const ThreadPool& pool) {
  const MixingLayout layout(k, s.C, 0);
  const bool padded = s.C % k.lanes != 0;
  void* to = padded ? zeroed(layout.end) : training_buffer.get(layout.end);
  fill_mixing(k, s, layout, to, pool);
  return view_mixing(layout, to);
}

WeightsView pack_combine(const Kernels& k, const Sources& s) {
  MixingLayout layout(k, s.C, 0);
  const int64_t skipped = layout.dwc;  // the gates before
  for (int64_t* at : {&layout.dwc, &layout.dwc_bias, &layout.proj, &layout.proj_bias, &layout.end})
    *at -= skipped;
  void* to = zeroed(layout.end);
  fill_combine(k, s, layout, to);
  WeightsView v{};
  v.dwc = floats(to, layout.dwc);
  v.dwc_bias = floats(to, layout.dwc_bias);
  v.proj = floats(to, layout.proj);
  v.proj_bias = floats(to, layout.proj_bias);
  return v;
}

TrainingGates pack_gates(const Kernels& k, const Sources& s) {
  const int64_t padded = (s.C + k.lanes - 1) / k.lanes * k.lanes;
  float* next = static_cast<float*>(zeroed(2 * 23 * padded * 4));
  auto take = [&](int64_t rows) {
    float* begin = next;
    next += rows * padded;
    return begin;
  };
  TrainingGates gates;
  for (int i = 0; i < 2; ++i) {
    const GateSources& g = s.gate[i];
    float *taps = take(9), *bias = take(1), *normalized = take(9), *normalized_bias = take(1);
    float *gammas = take(1), *betas = take(1), *spatial = take(1);
    pack_depthwise(g.depthwise_weight, g.depthwise_bias, s.C, k.lanes, taps, bias, unscaled,
                   unshifted);
    pack_depthwise(
        g.depthwise_weight, g.depthwise_bias, s.C, k.lanes, normalized, normalized_bias,
        [&](int64_t c) { return reciprocal_deviation(g, c); },
        [&](int64_t c, double scale) { return -at(g.norm_mean, c) * scale; });
    for (int64_t c = 0; c < s.C; ++c) {
      gammas[c] = static_cast<float>(gamma(g, c));
      betas[c] = static_cast<float>(beta(g, c));
    }
    copy_row(g.spatial_weight, 0, s.C, spatial);
    gates.gate[i] = {taps, bias, normalized, normalized_bias, gammas, betas, spatial};
  }
  return gates;
}

TrainingGates pack_taps(const Kernels& k, const Sources& s) {
  const int64_t padded = (s.C + k.lanes - 1) / k.lanes * k.lanes;
  float* next = static_cast<float*>(zeroed(2 * 10 * padded * 4));
  TrainingGates gates{};
  for (int i = 0; i < 2; ++i) {
    float* taps = next + i * 10 * padded;
    pack_depthwise(s.gate[i].depthwise_weight, s.gate[i].depthwise_bias, s.C, k.lanes, taps,
                   taps + 9 * padded, unscaled, unshifted);
    gates.gate[i].depthwise = taps;
    gates.gate[i].depthwise_bias = taps + 9 * padded;
  }
  return gates;
}

}  // namespace casvit
