// Backward of the combination: from grad to the gradients at v and at q2 + k2.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixer/combine.h"
#include "cpu/mixer/depthwise.h"
#include "cpu/mixer/load_rows.h"
#include "cpu/simd/accumulate.h"

namespace casvit {
namespace CASVIT_ISA {

// Forward: a = q2 + k2, l = dwc(a), u = l v, out = proj(u). Backward, with gX the gradient at X:
// from grad to gu, gl, gv and ga, the gradients of the weights, and the sums over ga that the
// gradients of the gates need.
static void backward_combine(const Geometry& g, const WeightsView& w, const BackwardCombine& io,
                             int64_t image, int64_t block, int64_t y_begin, int64_t y_end,
                             double* totals, float* temp) {
  const int64_t tensor = g.blocks * g.plane, padded = g.padded();
  const float* z[2];
  z[0] = io.planes + image * 3 * tensor + block * g.plane;
  z[1] = z[0] + tensor;
  const float* v = z[1] + tensor;
  const float* s[2];
  s[0] = io.spatial + image * 2 * g.pixels();
  s[1] = s[0] + g.pixels();
  const Vec gate[2] = {load(io.channel + image * padded + block * VL),
                       load(io.channel + (io.images + image) * padded + block * VL)};
  const float* dwc = w.dwc + block * 9 * VL;
  const Vec dwc_bias = load(w.dwc_bias + block * VL);
  const float* proj = w.proj + block * 9 * VL;

  const int64_t stride = 3 * g.C;
  const int channels = static_cast<int>(g.C - block * VL < VL ? g.C - block * VL : VL);
  float* grad_v = io.grad_qkv + image * g.pixels() * stride + 2 * g.C + block * VL;
  float* grad_sum = io.grad_sum + (image * g.blocks + block) * g.pixels() * VL;
  float* pixel_sums = io.pixel + (image * g.blocks + block) * 2 * g.pixels();

  // Ring buffers of three rows, and all rows of grad that the band needs.
  float *sum = temp, *hidden = sum + 3 * g.row;
  float* grad = hidden + 3 * g.row;
  float* products[2];  // ga g z of pixels that are not yet summed across the lanes
  products[0] = grad + (y_end - y_begin + 4) * g.row;
  products[1] = products[0] + (SUMMED_PIXELS + g.W + VL) * VL;
  std::memset(temp, 0, sizeof(float) * static_cast<size_t>(6 * g.row));
  auto ring = [&](float* base, int64_t y) { return base + (y + 3) % 3 * g.row; };
  auto grad_row = [&](int64_t y) { return grad + (y - y_begin + 2) * g.row; };
  read_rows(*io.grad, g, image, block, y_begin - 2, y_end + 2, grad);
  Accumulators<COMBINE_SUMS> sums(totals);

  auto make_sum = [&](int64_t y) {
    float* to = ring(sum, y);
    if (y < 0 || y >= g.H) return clear_row(g, to);
    add_gated(z[0] + (y + 1) * g.row + VL, z[1] + (y + 1) * g.row + VL, s[0] + y * g.W,
              s[1] + y * g.W, gate[0], gate[1], g.W, to + VL);
  };
  // gl of a halo row of the band.
  auto make_hidden_around = [&](int64_t y) {
    float* to = ring(hidden, y);
    if (y < 0 || y >= g.H) return clear_row(g, to);
    const float* from_v = v + (y + 1) * g.row + VL;
    const Taps proj_back(proj, true);
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec grad_mixed[N];
      for (int i = 0; i < N; ++i) grad_mixed[i] = zero();
      convolve<N>({grad_row(y - 1) + x * VL, grad_row(y) + x * VL, grad_row(y + 1) + x * VL},
                  proj_back, grad_mixed);
      for (int i = 0; i < N; ++i)
        store(to + (x + i + 1) * VL, mul(grad_mixed[i], load(from_v + (x + i) * VL)));
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
  };
  // gl and gv of a row of the band, and its part of the weight gradients.
  auto make_hidden = [&](int64_t y, int64_t first, int64_t width) {
    const int64_t at = first * VL;
    const float* const sums_from[3] = {ring(sum, y - 1) + at, ring(sum, y) + at,
                                       ring(sum, y + 1) + at};
    const float* const grads_from[3] = {grad_row(y - 1) + at, grad_row(y) + at,
                                        grad_row(y + 1) + at};
    float* to = ring(hidden, y) + at + VL;
    const float* from_v = v + (y + 1) * g.row + at + VL;
    float* to_v = grad_v + (y * g.W + first) * stride;
    const Taps dwc_taps(dwc), proj_back(proj, true);
    Vec taps[9], bias = zero();
    for (int t = 0; t < 9; ++t) taps[t] = zero();
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      const float* const sums_at[3] = {sums_from[0] + x * VL, sums_from[1] + x * VL,
                                       sums_from[2] + x * VL};
      const float* const grads_at[3] = {grads_from[0] + x * VL, grads_from[1] + x * VL,
                                        grads_from[2] + x * VL};
      Vec mixed[N], grad_mixed[N];
      for (int i = 0; i < N; ++i) mixed[i] = dwc_bias;
      convolve<N>(sums_at, dwc_taps, mixed);
      for (int i = 0; i < N; ++i) grad_mixed[i] = zero();
      convolve<N>(grads_at, proj_back, grad_mixed);
      Vec part = zero();
      for (int i = 0; i < N; ++i) {
        const Vec value = load(from_v + (x + i) * VL);
        store_first(to_v + (x + i) * stride, mul(grad_mixed[i], mixed[i]), channels);
        store(to + (x + i) * VL, mul(grad_mixed[i], value));
        mixed[i] = mul(mixed[i], value);
        part = add(part, load(grads_at[1] + (i + 1) * VL));
      }
      bias = add(bias, part);
      correlate<N>(grads_at, mixed, taps);
    };
    CASVIT_FOR_PIXEL_RUNS(width, pixels);
    for (int t = 0; t < 9; ++t) sums.add_to(PROJ + 8 - t, taps[t]);
    sums.add_to(PROJ_BIAS, bias);

    for (int t = 0; t < 9; ++t) taps[t] = zero();
    bias = zero();
    auto weights = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec own[N], part = zero();
      for (int i = 0; i < N; ++i) {
        own[i] = load(to + (x + i) * VL);
        part = add(part, own[i]);
      }
      bias = add(bias, part);
      correlate<N>({sums_from[0] + x * VL, sums_from[1] + x * VL, sums_from[2] + x * VL}, own,
                   taps);
    };
    CASVIT_FOR_PIXEL_RUNS(width, weights);
    sums.add_to(DWC, taps);
    sums.add_to(DWC_BIAS, bias);
  };
  int64_t waiting = 0;
  auto make_grad_sum = [&](int64_t y, int64_t first, int64_t width) {
    const float *q = z[0] + (y + 1) * g.row + (first + 1) * VL,
                *k = z[1] + (y + 1) * g.row + (first + 1) * VL;
    const float *s_q = s[0] + y * g.W + first, *s_k = s[1] + y * g.W + first;
    const float* const from[3] = {ring(hidden, y - 1) + first * VL, ring(hidden, y) + first * VL,
                                  ring(hidden, y + 1) + first * VL};
    float* to = grad_sum + (y * g.W + first) * VL;
    float *to_q = products[0] + waiting * VL, *to_k = products[1] + waiting * VL;
    const Taps dwc_back(dwc, true);
    Vec sum_q = zero(), sum_k = zero();
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec acc[N];
      for (int i = 0; i < N; ++i) acc[i] = zero();
      convolve<N>({from[0] + x * VL, from[1] + x * VL, from[2] + x * VL}, dwc_back, acc);
      Vec part_q = zero(), part_k = zero();
      for (int i = 0; i < N; ++i) {
        const int64_t at = (x + i) * VL;
        store(to + at, acc[i]);
        const Vec by_q = mul(acc[i], load(q + at)), by_k = mul(acc[i], load(k + at));
        part_q = fma(by_q, splat(s_q[x + i]), part_q);
        part_k = fma(by_k, splat(s_k[x + i]), part_k);
        store(to_q + at, mul(by_q, gate[0]));
        store(to_k + at, mul(by_k, gate[1]));
      }
      sum_q = add(sum_q, part_q);
      sum_k = add(sum_k, part_k);
    };
    CASVIT_FOR_PIXEL_RUNS(width, pixels);
    sums.add_to(CHANNEL_SUM, sum_q);
    sums.add_to(CHANNEL_SUM + 1, sum_k);
    sums.count(width);

    waiting += width;
    if (waiting < SUMMED_PIXELS && (y + 1 < y_end || first + width < g.W)) return;
    for (int i = 0; i < 2; ++i) {
      float* to_pixels = pixel_sums + i * g.pixels() + y * g.W + first + width - waiting;
      for (int64_t p = 0; p < waiting; p += VL)
        store_first(to_pixels + p, horizontal_sums(products[i] + p * VL),
                    static_cast<int>(waiting - p < VL ? waiting - p : VL));
    }
    waiting = 0;
  };

  auto by_spans = [&](const auto& make, int64_t y) {
    for (int64_t x = 0; x < g.W; x += SPAN) make(y, x, g.W - x < SPAN ? g.W - x : SPAN);
  };
  make_hidden_around(y_begin - 1);
  make_sum(y_begin - 1);
  make_sum(y_begin);
  for (int64_t y = y_begin; y < y_end; ++y) {
    make_sum(y + 1);
    by_spans(make_hidden, y);
    if (y > y_begin) by_spans(make_grad_sum, y - 1);
  }
  make_hidden_around(y_end);
  by_spans(make_grad_sum, y_end - 1);
  sums.flush();
}

}  // namespace CASVIT_ISA
}  // namespace casvit
