// The stem's first convolution, 3x3 of stride 2 over the image: pixels in the lanes, channels one
// after the other, so that three input channels waste nothing.
#pragma once

#include "cpu/network/linear.h"

namespace casvit {
namespace CASVIT_ISA {

// One row of one channel: even columns to `even`, odd ones to `even + stride`; what is outside is
// padding.
template <class T>
CASVIT_INLINE void split_columns(const T* from, int64_t step, int64_t W, float factor,
                                 float padding, int64_t stride, float* even) {
  float* odd = even + stride;
  const int64_t pairs = W / 2;
  if (step == 1)
    for (int64_t j = 0; j < pairs; ++j) {
      even[VL + j] = static_cast<float>(from[2 * j]) * factor;
      odd[VL + j] = static_cast<float>(from[2 * j + 1]) * factor;
    }
  else
    for (int64_t j = 0; j < pairs; ++j) {
      even[VL + j] = static_cast<float>(from[2 * j * step]) * factor;
      odd[VL + j] = static_cast<float>(from[(2 * j + 1) * step]) * factor;
    }
  if (W % 2) {
    even[VL + pairs] = static_cast<float>(from[2 * pairs * step]) * factor;
    odd[VL + pairs] = padding;
  }
  odd[VL - 1] = padding;
}

// CHANNELS channels of VL pixels from x on, ReLU, to planar words.
template <class Mac, int CHANNELS>
CASVIT_INLINE void stem_channels(const float* split, int64_t channels, const StemWeights& w,
                                 int64_t first, int64_t stride, int64_t x, float* to) {
  Vec acc[CHANNELS];
#pragma GCC unroll 24
  for (int i = 0; i < CHANNELS; ++i) acc[i] = splat(w.bias[first + i]);
  const float* weights = w.weights + first;
  for (int64_t c = 0; c < channels; ++c)
    for (int dy = 0; dy < 3; ++dy) {
      const float* even = split + (dy * channels + c) * 2 * stride + VL + x;
      const float* const from[3] = {even + stride - 1, even, even + stride};
      for (int dx = 0; dx < 3; ++dx, weights += w.mid) {
        const Vec v = load(from[dx]);
#pragma GCC unroll 24
        for (int i = 0; i < CHANNELS; ++i) acc[i] = fma(v, splat(weights[i]), acc[i]);
      }
    }
  float* own = to + first / Mac::K * stride + VL + x;
  constexpr int K = Mac::K < CHANNELS ? Mac::K : CHANNELS;  // an odd last channel has a word alone
#pragma GCC unroll 24
  for (int i = 0; i < CHANNELS; i += K)
    store(own + i / K * stride, Mac::pack(max_keep_nan(zero(), acc[i]),
                                          K > 1 ? max_keep_nan(zero(), acc[i + K - 1]) : zero()));
}

static void network_stem_row(const Image& image, const StemWeights& w, Precision precision,
                             int64_t y, float* split, float* to) {
  const int64_t H1 = (image.H + 1) / 2, W1 = (image.W + 1) / 2, stride = stem_row_stride(W1, VL);
  const int64_t words = network_k_steps(w.mid, precision);
  if (y < 0 || y >= H1) {
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(words * stride));
    return;
  }
  for (int64_t dy = 0; dy < 3; ++dy)
    for (int64_t c = 0; c < image.channels; ++c) {
      const int64_t row = 2 * y - 1 + dy;
      float* even = split + (dy * image.channels + c) * 2 * stride;
      const float padding = image.padding[c];
      if (row < 0 || row >= image.H) {
        for (int64_t i = 0; i < 2 * stride; ++i) even[i] = padding;
        continue;
      }
      const int64_t at = c * image.channel_stride + row * image.row_stride;
      // Lanes past the row are computed and cleared below: any number will do.
      for (int64_t i = VL + W1; i < stride; ++i) even[i] = even[stride + i] = 0.0f;
      if (image.bytes)
        split_columns(static_cast<const uint8_t*>(image.data) + at, image.column_stride, image.W,
                      1.0f / 255.0f, padding, stride, even);
      else
        split_columns(static_cast<const float*>(image.data) + at, image.column_stride, image.W,
                      1.0f, padding, stride, even);
    }
  with_mac(precision, [&](auto mac) {
    using Mac = decltype(mac);
    constexpr int MOST = VL == 16 ? 24 : VL == 8 ? 12 : 8;
    int64_t first = 0;
    auto channels = [&](auto count) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      for (; first + N <= w.mid; first += N)
        for (int64_t x = 0; x < W1; x += VL)
          stem_channels<Mac, N>(split, image.channels, w, first, stride, x, to);
    };
    channels(Count<MOST>{});
    channels(Count<8>{});
    channels(Count<2>{});
    channels(Count<1>{});
  });
  for (int64_t i = 0; i < words; ++i) {  // the halo of the second convolution
    to[i * stride + VL - 1] = 0.0f;
    to[i * stride + VL + W1] = 0.0f;
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
