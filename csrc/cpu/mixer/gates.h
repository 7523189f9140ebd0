// The gates and the combination, written once over Vec and compiled per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/store.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// The weights of a depthwise 3x3 of one channel block; `back`: in reverse, for its gradient.
struct Taps {
  Vec tap[9];
  explicit Taps(const float* from, bool back = false) {
    for (int t = 0; t < 9; ++t) tap[t] = in_register(load(from + (back ? 8 - t : t) * VL));
  }
};

// N neighbouring pixels of a depthwise 3x3: acc[i] += taps at pixel i. Every loaded vector serves
// the three pixels it touches. rows[dy] points at the left neighbour of pixel 0.
template <int N>
CASVIT_INLINE void convolve(const float* const (&rows)[3], const Taps& taps, Vec (&acc)[N]) {
#pragma GCC unroll 3
  for (int dy = 0; dy < 3; ++dy) {
    const Vec left = taps.tap[3 * dy], middle = taps.tap[3 * dy + 1], right = taps.tap[3 * dy + 2];
#pragma GCC unroll 16
    for (int j = 0; j < N + 2; ++j) {
      const Vec z = in_register(load(rows[dy] + j * VL));
      if (j < N) acc[j] = fma(z, left, acc[j]);
      if (j >= 1 && j <= N) acc[j - 1] = fma(z, middle, acc[j - 1]);
      if (j >= 2) acc[j - 2] = fma(z, right, acc[j - 2]);
    }
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f<N>(x) over [0, n) in runs of 7 (all CAS-ViT maps are multiples of 7 wide) and a rest.
#define CASVIT_FOR_PIXEL_RUNS(n, f)                   \
  do {                                                \
    int64_t x_ = 0;                                   \
    for (; x_ + 7 <= (n); x_ += 7) f(Count<7>{}, x_); \
    if (x_ + 4 <= (n)) {                              \
      f(Count<4>{}, x_);                              \
      x_ += 4;                                        \
    }                                                 \
    for (; x_ < (n); ++x_) f(Count<1>{}, x_);         \
  } while (0)
static void spatial_gate(const Geometry& g, const GateView& w, const float* z, int64_t strip,
                         float* s, float* sums, float* temp) {
  const Strips strips = make_strips(g);
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
  // The gates overwrite the partial sums they come from, which are already read.
  for (int64_t i = 0; i < pixels; i += VL) store(temp + i, sigmoid(sum_each(temp + i * VL)));
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

// q2 + k2 of n pixels.
CASVIT_INLINE void add_gated(const float* q, const float* k, const float* s_q, const float* s_k,
                             Vec gate_q, Vec gate_k, int64_t n, float* to) {
  for (int64_t x = 0; x < n; ++x) {
    const Vec a = mul(load(q + x * VL), mul(splat(s_q[x]), gate_q));
    store(to + x * VL, fma(load(k + x * VL), mul(splat(s_k[x]), gate_k), a));
  }
}

static void combine(const Geometry& g, const WeightsView& w, const float* planes, const float* s,
                    const float* const gate[2], int64_t block, int64_t y_begin, int64_t y_end,
                    const Output& out, int64_t image, float* temp) {
  const int64_t tensor = g.blocks * g.plane;
  const float* q = planes + block * g.plane;
  const float* k = q + tensor;
  const float* v = k + tensor;
  const Vec gate_q = load(gate[0] + block * VL), gate_k = load(gate[1] + block * VL);
  const Vec dwc_bias = load(w.dwc_bias + block * VL), proj_bias = load(w.proj_bias + block * VL);
  // Rings of three rows each; rows outside the image are zero, and so are the borders.
  float* sum = temp;                // q2 + k2
  float* mixed = temp + 3 * g.row;  // dwc(q2 + k2) * v
  float* result = temp + 6 * g.row;
  auto ring = [&](float* base, int64_t y) { return base + (y + 3) % 3 * g.row; };
  std::memset(temp, 0, sizeof(float) * static_cast<size_t>(6 * g.row));

  auto make_sum = [&](int64_t y) {
    float* to = ring(sum, y) + VL;
    if (y < 0 || y >= g.H) {
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(g.W * VL));
      return;
    }
    add_gated(q + (y + 1) * g.row + VL, k + (y + 1) * g.row + VL, s + y * g.W,
              s + g.pixels() + y * g.W, gate_q, gate_k, g.W, to);
  };
  auto make_mixed = [&](int64_t y) {
    float* to = ring(mixed, y) + VL;
    if (y < 0 || y >= g.H) {
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(g.W * VL));
      return;
    }
    const float* from_v = v + (y + 1) * g.row + VL;
    const Taps taps(w.dwc + block * 9 * VL);
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec acc[N];
      for (int i = 0; i < N; ++i) acc[i] = dwc_bias;
      const float* const from[3] = {ring(sum, y - 1) + x * VL, ring(sum, y) + x * VL,
                                    ring(sum, y + 1) + x * VL};
      convolve<N>(from, taps, acc);
      for (int i = 0; i < N; ++i)
        store(to + (x + i) * VL, mul(acc[i], load(from_v + (x + i) * VL)));
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
  };

  const int64_t most = combine_rows(g);
  int64_t gathered = 0;
  for (int64_t y = y_begin - 2; y <= y_begin; ++y) make_sum(y);
  make_mixed(y_begin - 1);
  make_sum(y_begin + 1);
  make_mixed(y_begin);
  for (int64_t y = y_begin; y < y_end; ++y) {
    make_sum(y + 2);
    make_mixed(y + 1);
    const Taps taps(w.proj + block * 9 * VL);
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec acc[N];
      for (int i = 0; i < N; ++i) acc[i] = proj_bias;
      const float* const from[3] = {ring(mixed, y - 1) + x * VL, ring(mixed, y) + x * VL,
                                    ring(mixed, y + 1) + x * VL};
      convolve<N>(from, taps, acc);
      for (int i = 0; i < N; ++i) store(result + (gathered * g.W + x + i) * VL, acc[i]);
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
    if (++gathered < most && y + 1 < y_end) continue;
    const int64_t first = (y + 1 - gathered) * g.W;
    switch (out.dtype) {
      case DType::F32:
        write_out<float>(g, out, image, block, first, gathered * g.W, result, VL);
        break;
      case DType::BF16:
        write_out<Bf16>(g, out, image, block, first, gathered * g.W, result, VL);
        break;
      case DType::F16:
        write_out<F16>(g, out, image, block, first, gathered * g.W, result, VL);
        break;
    }
    gathered = 0;
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
