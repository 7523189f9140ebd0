// Weights in the layouts that the kernels read: taps as B operands of the mma, BatchNorm folded in.
#pragma once

#include "tile.h"
#include "weights.h"

namespace casvit::cuda {

// Where the pieces lie in the one buffer of packed weights, in 16-byte words.
//   gate taps   [gate][chunk][kernel row][lane] uint4: two words, two more of what rounding left
//   over gate rows   [gate][chunk][channel pair] float4: bias and weight to the spatial gate of two
//   channels conv taps   [dwc, proj][chunk][kernel row][lane] uint2 conv biases [dwc, proj][chunk]
//   float4 channel     [gate][8 channels][16 inputs][lane] uint4: the channel gates' weights, two
//   words and two more of what rounding left over
struct PackedLayout {
  int channel_tiles, channel_steps;  // of 8 channels, of 16 inputs
  int64_t gate_rows, conv_taps, conv_bias, channel, end;
  CASVIT_HOST_DEVICE PackedLayout(int channels, int padded) {
    const int64_t chunks = padded / kChunk;
    channel_tiles = (padded + 7) / 8;
    channel_steps = (channels + 15) / 16;
    gate_rows = 2 * chunks * 3 * 32;
    conv_taps = gate_rows + 2 * chunks * 2;
    conv_bias = conv_taps + 2 * chunks * 3 * 16;
    channel = conv_bias + 2 * chunks;
    end = channel + static_cast<int64_t>(2 * 32) * channel_tiles * channel_steps;
  }
};

CASVIT_DEVICE float read(const Weight& w, int64_t i) {
  if (w.dtype == 0) return load_constant(static_cast<const float*>(w.data) + i);
  const uint32_t bits = load_constant(static_cast<const uint16_t*>(w.data) + i);
  return w.dtype == 1 ? low2<Bf16>(bits) : low2<Fp16>(bits);
}

// 2^e for the e that brings the largest |v| into [1/2, 1), within what a float holds; 1 for zeros
// and for what is no number. Scaling by it is exact, and keeps float16 taps within their range.
CASVIT_DEVICE float power_of_two(float largest) {
  if (!(largest > 1e-30f && largest < 1e30f)) return 1.0f;
  const uint32_t exponent = float_bits(largest) & 0x7f800000u;
  return bits_float(exponent) * 2.0f;
}

struct PackArguments {
  Weights weights;
  const float*
      statistics;  // (2, 2, C) mean and biased variance; null: taps as they are, for statistics
  float eps[2];
  int channels, padded;
  uint4* packed;
};

constexpr int kPackThreads = 96;  // three kernel rows x 32 lanes

// Of one gate, the chunk's half of a tile of 8 channels; the last chunk fills a tile alone.
template <class T>
CASVIT_DEVICE void pack_channel_gate(const PackArguments& a, const PackedLayout& layout, int gate,
                                     int chunk) {
  const bool alone = chunk % 2 == 0 && (chunk + 1) * kChunk == a.padded;
  const int columns = alone ? 8 : kChunk, first = chunk % 2 * kChunk;
  uint4* to =
      a.packed + layout.channel +
      static_cast<int64_t>(gate * layout.channel_tiles + chunk / 2) * layout.channel_steps * 32;
  for (int i = thread_index(); i < layout.channel_steps * columns * 4; i += kPackThreads) {
    const int step = i / (columns * 4), lane = first * 4 + i % (columns * 4);
    const int channel = chunk / 2 * 8 + lane / 4;
    uint32_t words[2], rests[2];
    for (int half = 0; half < 2; ++half) {
      float v[2];
      for (int e = 0; e < 2; ++e) {
        const int input = step * 16 + half * 8 + lane % 4 * 2 + e;
        const bool there = channel < a.channels && input < a.channels;
        v[e] = there ? read(a.weights.gates[gate].channel,
                            static_cast<int64_t>(channel) * a.channels + input)
                     : 0.0f;
      }
      words[half] = pack2<T>(v[0], v[1]);
      rests[half] = pack2<T>(v[0] - low2<T>(words[half]), v[1] - high2<T>(words[half]));
    }
    store_global(to + step * 32 + lane, uint4{words[0], words[1], rests[0], rests[1]});
  }
}

// Grid: (chunks, 2 gates + 2 convolutions). Of gates without statistics the weight of a row's
// channel is the scale of its taps, by which statistics have to be multiplied.
template <class T>
CASVIT_DEVICE void pack_block(const PackArguments& a) {
  const PackedLayout layout(a.channels, a.padded);
  const int chunk = block_x(), which = block_y(), chunks = a.padded / kChunk;
  const int dy = thread_index() / 32, lane = thread_index() % 32;
  const bool gate = which < 2;
  const GateWeights& g = a.weights.gates[gate ? which : 0];
  const Weight& taps = gate ? g.depthwise : which == 2 ? a.weights.dwc : a.weights.proj;
  const Weight& biases = gate ? g.bias : which == 2 ? a.weights.dwc_bias : a.weights.proj_bias;

  // Each thread works out the four channels for itself: this is little, and once per call.
  float scale[kChunk], bias[kChunk], spatial[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int channel = chunk * kChunk + i;
    scale[i] = 1.0f;
    bias[i] = spatial[i] = 0.0f;
    if (channel >= a.channels) continue;
    bias[i] = read(biases, channel);
    if (!gate) continue;
    if (a.statistics) {
      const float* s = a.statistics + which * 2 * a.channels + channel;
      scale[i] = 1.0f / sqrtf(load_constant(s + a.channels) + a.eps[which]);
      if (g.norm_weight.data) scale[i] *= read(g.norm_weight, channel);
      bias[i] = (bias[i] - load_constant(s)) * scale[i];
      if (g.norm_bias.data) bias[i] += read(g.norm_bias, channel);
      spatial[i] = read(g.spatial, channel);
    } else {
      spatial[i] = 1.0f;
    }
    float largest = 0.0f;
    for (int tap = 0; tap < 9; ++tap)
      largest = fmaxf(largest, fabsf(read(taps, channel * 9 + tap) * scale[i]));
    const float unit = power_of_two(largest);
    scale[i] /= unit;
    bias[i] /= unit;
    spatial[i] *= unit;
  }

  uint32_t words[2], rests[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float value[2], rounded[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = half * 8 + lane % 4 * 2 + i, n = lane / 4;
      const int tap = tap_of(dy, k, n), channel = chunk * kChunk + n % kChunk;
      value[i] = 0.0f;
      if (tap >= 0 && channel < a.channels) {
        float s = scale[0];
#pragma unroll
        for (int j = 1; j < kChunk; ++j) s = n % kChunk == j ? scale[j] : s;
        value[i] = read(taps, static_cast<int64_t>(chunk) * kChunk * 9 + tap) * s;
      }
    }
    words[half] = pack2<T>(value[0], value[1]);
    rounded[0] = low2<T>(words[half]);
    rounded[1] = high2<T>(words[half]);
    rests[half] = pack2<T>(value[0] - rounded[0], value[1] - rounded[1]);
  }
  if (gate)
    store_global(a.packed + (static_cast<int64_t>(which * chunks + chunk) * 3 + dy) * 32 + lane,
                 uint4{words[0], words[1], rests[0], rests[1]});
  else
    store_global(reinterpret_cast<uint2*>(a.packed + layout.conv_taps) +
                     (static_cast<int64_t>((which - 2) * chunks + chunk) * 3 + dy) * 32 + lane,
                 uint2{words[0], words[1]});
  if (thread_index() == 0) {
    float4* rows = reinterpret_cast<float4*>(a.packed);
    if (gate) {
      rows += layout.gate_rows + (which * chunks + chunk) * 2;
      store_global(rows, float4{bias[0], spatial[0], bias[1], spatial[1]});
      store_global(rows + 1, float4{bias[2], spatial[2], bias[3], spatial[3]});
    } else {
      store_global(rows + layout.conv_bias + (which - 2) * chunks + chunk,
                   float4{bias[0], bias[1], bias[2], bias[3]});
    }
  }
  if (gate && a.statistics) pack_channel_gate<T>(a, layout, which, chunk);
}

// A warp's taps of one chunk.
CASVIT_DEVICE void load_taps(uint32_t (&taps)[6], const uint4* packed, int64_t conv_taps, int index,
                             int lane) {
  const uint2* from =
      reinterpret_cast<const uint2*>(packed + conv_taps) + static_cast<int64_t>(index) * 96 + lane;
#pragma unroll
  for (int dy = 0; dy < 3; ++dy) {
    const uint2 word = load_constant(from + dy * 32);
    taps[2 * dy] = word.x, taps[2 * dy + 1] = word.y;
  }
}
CASVIT_DEVICE void load_exact_taps(uint32_t (&taps)[12], const uint4* packed, int index, int lane) {
  const uint4* from = packed + static_cast<int64_t>(index) * 96 + lane;
#pragma unroll
  for (int dy = 0; dy < 3; ++dy) {
    const uint4 word = load_constant(from + dy * 32);
    taps[4 * dy] = word.x, taps[4 * dy + 1] = word.y;
    taps[4 * dy + 2] = word.z, taps[4 * dy + 3] = word.w;
  }
}

}  // namespace casvit::cuda
