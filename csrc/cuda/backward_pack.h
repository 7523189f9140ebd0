// Weights as the backward's kernels read them: the gates' taps with BatchNorm's scale but not its
// weight and bias, so that their sums are n^; and the other taps, plain and turned round.
#pragma once

#include "pack.h"

namespace casvit::cuda {

// Turned round, for transposed convolutions.
enum BackwardTaps { kDwc, kDwcTurned, kProjTurned, kDepthwiseTurned };  // the last two times: q, k

// In 16-byte words.
//   gate taps   [gate][chunk][kernel row][lane] uint4, as in PackedLayout
//   gate rows   [gate][channel] float4: bias; what n^ is a multiple of; BatchNorm's weight times
//   that;
//               its bias
//   conv taps   [BackwardTaps][chunk][kernel row][lane] uint2
//   dwc's bias  [chunk] float4
//   spatial     [gate][chunk] float4
struct BackwardLayout {
  int64_t gate_rows, conv_taps, bias, spatial, end;
  CASVIT_HOST_DEVICE explicit BackwardLayout(int padded) {
    const int64_t chunks = padded / kChunk;
    gate_rows = 2 * chunks * 3 * 32;
    conv_taps = gate_rows + 2 * padded;
    bias = conv_taps + 5 * chunks * 3 * 16;
    spatial = bias + chunks;
    end = spatial + 2 * chunks;
  }
};

// Grid: (chunks, 2 gates + 5 convolutions).
template <class T>
CASVIT_DEVICE void backward_pack_block(const PackArguments& a) {
  const BackwardLayout layout(a.padded);
  const int chunk = block_x(), which = block_y(), chunks = a.padded / kChunk;
  const int dy = thread_index() / 32, lane = thread_index() % 32, conv = which - 2;
  const bool gate = which<2, turned = conv> kDwc;
  const int z = gate ? which : conv == kDepthwiseTurned + 1;
  const GateWeights& g = a.weights.gates[z];
  const Weight& taps = gate || conv >= kDepthwiseTurned ? g.depthwise
                       : conv == kProjTurned            ? a.weights.proj
                                                        : a.weights.dwc;
  if (gate && !a.statistics) return;  // for B1 alone
  float scale[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int channel = chunk * kChunk + i;
    scale[i] = 1.0f;
    float4 row{0.0f, 1.0f, 1.0f, 0.0f};
    float spatial = 0.0f, bias = 0.0f;
    if (channel < a.channels) {
      if (gate) {
        const float* s = a.statistics + z * 2 * a.channels + channel;
        scale[i] = 1.0f / sqrtf(load_constant(s + a.channels) + a.eps[z]);
        float largest = 0.0f;
        for (int tap = 0; tap < 9; ++tap)
          largest = fmaxf(largest, fabsf(read(taps, channel * 9 + tap) * scale[i]));
        const float unit = power_of_two(largest);
        scale[i] /= unit;
        const float weight = g.norm_weight.data ? read(g.norm_weight, channel) : 1.0f;
        row = {(read(g.bias, channel) - load_constant(s)) * scale[i], unit, weight * unit,
               g.norm_bias.data ? read(g.norm_bias, channel) : 0.0f};
        spatial = read(g.spatial, channel);
      } else {
        bias = read(a.weights.dwc_bias, channel);
      }
    }
    if (thread_index() == 0 && gate) {
      store_global(reinterpret_cast<float4*>(a.packed) + layout.gate_rows + z * a.padded + channel,
                   row);
      store_global(reinterpret_cast<float*>(a.packed + layout.spatial) + z * a.padded + channel,
                   spatial);
    }
    if (thread_index() == 0 && conv == kDwc)
      store_global(reinterpret_cast<float*>(a.packed + layout.bias) + channel, bias);
  }
  uint32_t words[2], rests[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float v[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = lane / 4, channel = chunk * kChunk + n % kChunk;
      const int tap = tap_of(dy, half * 8 + lane % 4 * 2 + i, n);
      v[i] = 0.0f;
      if (tap >= 0 && channel < a.channels) {
        const int own = tap - n % kChunk * 9;
        float s = scale[0];
#pragma unroll
        for (int j = 1; j < kChunk; ++j) s = n % kChunk == j ? scale[j] : s;
        v[i] = read(taps, static_cast<int64_t>(channel) * 9 + (turned ? 8 - own : own)) * s;
      }
    }
    words[half] = pack2<T>(v[0], v[1]);
    rests[half] = pack2<T>(v[0] - low2<T>(words[half]), v[1] - high2<T>(words[half]));
  }
  if (gate)
    store_global(a.packed + (static_cast<int64_t>(z * chunks + chunk) * 3 + dy) * 32 + lane,
                 uint4{words[0], words[1], rests[0], rests[1]});
  else
    store_global(reinterpret_cast<uint2*>(a.packed + layout.conv_taps) +
                     (static_cast<int64_t>(conv * chunks + chunk) * 3 + dy) * 32 + lane,
                 uint2{words[0], words[1]});
}

}  // namespace casvit::cuda
