// The spatial and the channel gates of q and k.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixer/depthwise.h"
#include "cpu/simd/math.h"

namespace casvit {
namespace CASVIT_ISA {

static void spatial_gate(const Geometry& g, const GateView& w, const float* z, const Strips& strips,
                         int64_t strip, float* s, float* sums, float* temp) {
  const int64_t y0 = strip / strips.across * strips.rows,
                x0 = strip % strips.across * strips.columns;
  const int64_t rows = y0 + strips.rows < g.H ? strips.rows : g.H - y0;
  const int64_t columns = x0 + strips.columns < g.W ? strips.columns : g.W - x0;

  for (int64_t block = 0; block < g.blocks; ++block) {
    const Taps taps(w.depthwise + block * 9 * VL);
    const Vec bias = load(w.depthwise_bias + block * VL), spatial = load(w.spatial + block * VL);
    for (int64_t y = 0; y < rows; ++y) {
      const float* above = z + block * g.plane + (y0 + y) * g.row + x0 * VL;
      float* partial = temp + y * columns * VL;
      auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        Vec acc[N];
        for (int i = 0; i < N; ++i) acc[i] = bias;
        const float* const from[3] = {above + x * VL, above + g.row + x * VL,
                                      above + 2 * g.row + x * VL};
        convolve<N>(from, taps, acc);
        for (int i = 0; i < N; ++i) {
          const Vec hidden = max_keep_nan(zero(), acc[i]);
          float* p = partial + (x + i) * VL;
          store(p, block == 0 ? mul(hidden, spatial) : fma(hidden, spatial, load(p)));
        }
      };
      CASVIT_FOR_PIXEL_RUNS(columns, pixels);
    }
  }

  const int64_t pixels = rows * columns;
  for (int64_t i = pixels; i < pixels + VL; ++i) store(temp + i * VL, zero());
  // In place: gate i overwrites partial sums that have been read.
  for (int64_t i = 0; i < pixels; i += VL) store(temp + i, sigmoid(horizontal_sums(temp + i * VL)));
  for (int64_t y = 0; y < rows; ++y)
    std::memcpy(s + (y0 + y) * g.W + x0, temp + y * columns,
                sizeof(float) * static_cast<size_t>(columns));

  for (int64_t block = 0; block < g.blocks; ++block) {
    Vec sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = zero();
    for (int64_t y = 0; y < rows; ++y) {
      const float* p = z + block * g.plane + (y0 + y + 1) * g.row + (x0 + 1) * VL;
      const float* gates = temp + y * columns;
      int64_t x = 0;
      for (; x + 8 <= columns; x += 8)
        for (int i = 0; i < 8; ++i)
          sum[i] = fma(load(p + (x + i) * VL), splat(gates[x + i]), sum[i]);
      for (int i = 0; i < 7; ++i)
        if (x + i < columns) sum[i] = fma(load(p + (x + i) * VL), splat(gates[x + i]), sum[i]);
    }
    for (int n = 4; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) sum[i] = add(sum[i], sum[i + n]);
    store(sums + block * VL, sum[0]);
  }
}

template <int M>
CASVIT_INLINE void channel_gate_of(const Geometry& g, const GateView& w, const float* pooled,
                                   float* gate, int64_t block) {
  const int64_t padded = g.padded();
  const float* weights = w.channel + block * g.C * VL;
  Vec acc[M][2];
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
  for (int64_t i = 0; i + 2 <= g.C; i += 2) {
    const Vec even = load(weights + i * VL);
    const Vec odd = load(weights + (i + 1) * VL);
    for (int m = 0; m < M; ++m) {
      acc[m][0] = fma(even, splat(pooled[m * padded + i]), acc[m][0]);
      acc[m][1] = fma(odd, splat(pooled[m * padded + i + 1]), acc[m][1]);
    }
  }
  if (g.C % 2) {
    const Vec last = load(weights + (g.C - 1) * VL);
    for (int m = 0; m < M; ++m)
      acc[m][0] = fma(last, splat(pooled[m * padded + g.C - 1]), acc[m][0]);
  }
  for (int m = 0; m < M; ++m)
    store(gate + m * padded + block * VL, sigmoid(add(acc[m][0], acc[m][1])));
}

static void channel_gate(const Geometry& g, const GateView& w, const float* pooled, float* gate,
                         int64_t images, int64_t begin, int64_t end) {
  const int64_t padded = g.padded();
  for (int64_t block = begin; block < end; ++block) {
    int64_t m = 0;
    for (; m + 4 <= images; m += 4)
      channel_gate_of<4>(g, w, pooled + m * padded, gate + m * padded, block);
    for (; m < images; ++m) channel_gate_of<1>(g, w, pooled + m * padded, gate + m * padded, block);
  }
}

static void pack_channel_gate(const float* matrix, int64_t C, int64_t block, float* to) {
  const int64_t first = block * VL;
  to += first * C;
  for (int64_t i = 0; i < C; i += VL) {
    const int64_t inputs = C - i < VL ? C - i : VL;
    Vec r[VL];
    for (int64_t o = 0; o < VL; ++o)
      r[o] = first + o < C
                 ? load_first_as_float(matrix + (first + o) * C + i, static_cast<int>(inputs))
                 : zero();
    transpose(r);
    for (int64_t x = 0; x < inputs; ++x) store(to + (i + x) * VL, r[x]);
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
