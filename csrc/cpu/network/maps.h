// What is done to maps between the GEMMs: operands, neighbourhoods, depthwise with GELU, the
// combination, means and outputs.
#pragma once

#include "cpu/mixer/combine.h"
#include "cpu/network/linear.h"
#include "cpu/simd/store.h"

namespace casvit {
namespace CASVIT_ISA {

static void network_operand(const float* map, int64_t block_stride, int64_t count, int64_t blocks,
                            Precision precision, float* to) {
  with_mac(precision, [=](auto mac) {
    using Mac = decltype(mac);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < count; ++i)
        put_words(Mac{}, to + (b * count + i) * WORDS<Mac>, load(map + b * block_stride + i * VL));
  });
}

static void network_neighbourhoods(const float* map, int64_t block_stride, int64_t H, int64_t W,
                                   int64_t blocks, Precision precision, int64_t begin, int64_t end,
                                   float* to) {
  const int64_t W_out = (W + 1) / 2;
  with_mac(precision, [=](auto mac) {
    using Mac = decltype(mac);
    float* out = to;
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t pixel = begin; pixel < end;) {  // what lies in one row
          const int64_t row = pixel / W_out, first = pixel % W_out;
          const int64_t last = end - pixel < W_out - first ? first + end - pixel : W_out;
          const int64_t y = 2 * row - 1 + tap / 3;
          const bool inside = y >= 0 && y < H;
          const float* from = map + b * block_stride + y * W * VL;
          for (int64_t i = first; i < last; ++i, out += WORDS<Mac>) {
            const int64_t x = 2 * i - 1 + tap % 3;
            put_words(Mac{}, out, inside && x >= 0 && x < W ? load(from + x * VL) : zero());
          }
          pixel += last - first;
        }
  });
}

static void network_depthwise_gelu(const Ring& ring, const DepthwiseWeights& w, int64_t H,
                                   int64_t W, Precision precision, int64_t y_begin, int64_t y_end,
                                   int64_t begin, int64_t end, int64_t pixels, float* to) {
  with_mac(precision, [&](auto mac) {
    using Mac = decltype(mac);
    for (int64_t block = begin; block < end; ++block) {
      const Taps taps(w.taps + block * 9 * VL);
      const Vec bias = load(w.bias + block * VL);
      const float* plane = ring.data + block * ring.plane;
      float* out = to + block * pixels * WORDS<Mac>;
      for (int64_t y = y_begin; y < y_end; ++y, out += W * WORDS<Mac>) {
        const float* const rows[3] = {
            y % H == 0 ? ring.zeros : plane + (y - 1) % ring.slots * ring.row,
            plane + y % ring.slots * ring.row,
            y % H == H - 1 ? ring.zeros : plane + (y + 1) % ring.slots * ring.row};
        auto run = [&](auto count, int64_t x) __attribute__((always_inline)) {
          constexpr int N = decltype(count)::value;
          Vec acc[N];
          for (int i = 0; i < N; ++i) acc[i] = bias;
          const float* const from[3] = {rows[0] + x * VL, rows[1] + x * VL, rows[2] + x * VL};
          convolve<N>(from, taps, acc);
          for (int i = 0; i < N; ++i)
            put_words(Mac{}, out + (x + i) * WORDS<Mac>, gelu_for(Mac{}, acc[i]));
        };
        CASVIT_FOR_PIXEL_RUNS(W, run);
      }
    }
  });
}

static void network_combine(const Geometry& g, const DepthwiseWeights& dwc,
                            const DepthwiseWeights& proj, const float* planes, const float* s,
                            const float* const gate[2], int64_t block, int64_t y_begin,
                            int64_t y_end, float* to, float* temp) {
  combine_rows(
      g, {dwc.taps, dwc.bias, proj.taps, proj.bias}, planes, s, gate, block, y_begin, y_end, temp,
      [=](int64_t y, int64_t x, auto count, const Vec* acc) __attribute__((always_inline)) {
        float* own = to + (y * g.W + x) * VL;
        for (int i = 0; i < decltype(count)::value; ++i)
          store(own + i * VL, add(acc[i], load(own + i * VL)));
      },
      [](int64_t) {});
}

static void network_mean(const float* map, int64_t pixels, float* to) {
  Vec sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = zero();
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4)
    for (int i = 0; i < 4; ++i) sum[i] = add(sum[i], load(map + (p + i) * VL));
  for (; p < pixels; ++p) sum[0] = add(sum[0], load(map + p * VL));
  const Vec all = add(add(sum[0], sum[1]), add(sum[2], sum[3]));
  store(to, div(all, splat(static_cast<float>(pixels))));
}

static void network_scaled(const Geometry& g, const float* map, const float* scale,
                           const float* shift, int64_t block, int64_t begin, int64_t end,
                           const Output& out, int64_t image, float* temp) {
  const Vec by = load(scale + block * VL), plus = load(shift + block * VL);
  for (int64_t p = begin; p < end; p += SCALED_PIXELS) {
    const int64_t count = end - p < SCALED_PIXELS ? end - p : SCALED_PIXELS;
    for (int64_t i = 0; i < count; ++i)
      store(temp + i * VL, fma(load(map + (p + i) * VL), by, plus));
    store_block<float>(g, out, image, block, p, count, temp, VL);
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
