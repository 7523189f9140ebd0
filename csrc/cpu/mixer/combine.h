// out = proj(dwc(q2 + k2) * v), rows of one channel block at a time.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixer/depthwise.h"
#include "cpu/simd/store.h"

namespace casvit {
namespace CASVIT_ISA {

// q2 + k2 of n pixels.
CASVIT_INLINE void add_gated(const float* q, const float* k, const float* s_q, const float* s_k,
                             Vec gate_q, Vec gate_k, int64_t n, float* to) {
  for (int64_t x = 0; x < n; ++x) {
    const Vec a = mul(load(q + x * VL), mul(splat(s_q[x]), gate_q));
    store(to + x * VL, fma(load(k + x * VL), mul(splat(s_k[x]), gate_k), a));
  }
}

struct CombineWeights {
  const float *dwc, *dwc_bias, *proj, *proj_bias;
};

// finish(y, x, count, sums): so many pixels of a row; row_done(y) behind the last of a row.
template <class Finish, class RowDone>
CASVIT_INLINE void combine_rows(const Geometry& g, const CombineWeights& w, const float* planes,
                                const float* s, const float* const gate[2], int64_t block,
                                int64_t y_begin, int64_t y_end, float* temp, const Finish& finish,
                                const RowDone& row_done) {
  const int64_t tensor = g.blocks * g.plane;
  const float* q = planes + block * g.plane;
  const float* k = q + tensor;
  const float* v = k + tensor;
  const Vec gate_q = load(gate[0] + block * VL), gate_k = load(gate[1] + block * VL);
  const Vec dwc_bias = load(w.dwc_bias + block * VL), proj_bias = load(w.proj_bias + block * VL);
  // Ring buffers of three rows; rows outside the image and halo columns are zero.
  float* sum = temp;                // q2 + k2
  float* mixed = temp + 3 * g.row;  // dwc(q2 + k2) * v
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
      finish(y, x, count, acc);
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
    row_done(y);
  }
}

static void combine(const Geometry& g, const WeightsView& w, const float* planes, const float* s,
                    const float* const gate[2], int64_t block, int64_t y_begin, int64_t y_end,
                    const Output& out, int64_t image, float* temp) {
  float* result = temp + 6 * g.row;
  const int64_t most = combined_rows(g);
  int64_t gathered = 0;
  auto gather = [&](int64_t, int64_t x, auto count, const Vec* acc) __attribute__((always_inline)) {
    for (int i = 0; i < decltype(count)::value; ++i)
      store(result + (gathered * g.W + x + i) * VL, acc[i]);
  };
  auto row_done = [&](int64_t y) __attribute__((always_inline)) {
    if (++gathered < most && y + 1 < y_end) return;
    const int64_t first = (y + 1 - gathered) * g.W;
    switch (out.dtype) {
      case DType::F32:
        store_block<float>(g, out, image, block, first, gathered * g.W, result, VL);
        break;
      case DType::BF16:
        store_block<Bf16>(g, out, image, block, first, gathered * g.W, result, VL);
        break;
      case DType::F16:
        store_block<F16>(g, out, image, block, first, gathered * g.W, result, VL);
        break;
    }
    gathered = 0;
  };
  combine_rows(g, {w.dwc, w.dwc_bias, w.proj, w.proj_bias}, planes, s, gate, block, y_begin, y_end,
               temp, gather, row_done);
}

}  // namespace CASVIT_ISA
}  // namespace casvit
