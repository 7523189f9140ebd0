// Backward of the gates' depthwise convolutions, down to the gradients at q and k.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixer/depthwise.h"
#include "cpu/simd/accumulate.h"

namespace casvit {
namespace CASVIT_ISA {

// One gate: from the gradient at its logits to gd, that at its depthwise convolution, and that at
// z.
static void backward_depthwise(const Geometry& g, const TrainingGate& w,
                               const BackwardDepthwise& io, int64_t which, int64_t image,
                               int64_t block, int64_t y_begin, int64_t y_end, double* totals,
                               float* temp) {
  const int64_t padded = g.padded(), at = block * VL;
  const float* z = io.planes + ((image * 3 + which) * g.blocks + block) * g.plane;
  const float* s = io.spatial + (image * 2 + which) * g.pixels();
  const float* logit = io.logit + (image * 2 + which) * g.pixels();
  const float* grad_sum = io.grad_sum + (image * g.blocks + block) * g.pixels() * VL;
  const int64_t vector = (which * io.images + image) * padded + at;
  const Vec gate = load(io.channel + vector), shift = load(io.shift + vector);
  const float* factors = io.coefficients + which * 3 * padded + at;
  const Vec by_grad = mul(load(factors), load(w.spatial + at)), constant = load(factors + padded),
            by_hat = load(factors + 2 * padded);
  const float *normalized = w.normalized + block * 9 * VL,
              *depthwise = w.depthwise + block * 9 * VL;
  const Vec bias = load(w.normalized_bias + at);
  const Vec gamma = load(w.gamma + at), beta = load(w.beta + at);
  const int64_t stride = 3 * g.C;
  const int channels = static_cast<int>(g.C - at < VL ? g.C - at : VL);
  float* grad_z = io.grad_qkv + image * g.pixels() * stride + which * g.C + at;

  // A ring buffer of three rows of gd.
  std::memset(temp, 0, sizeof(float) * static_cast<size_t>(3 * g.row));
  auto ring = [&](int64_t y) { return temp + (y + 3) % 3 * g.row; };
  Accumulators<DEPTHWISE_SUMS> sums(totals);
  auto make_grad = [&](int64_t y) {
    float* to = ring(y) + VL;
    if (y < 0 || y >= g.H) return clear_row(g, ring(y));
    const bool own = y >= y_begin && y < y_end;
    const float *above = z + y * g.row, *es = logit + y * g.W;
    const Taps taps(normalized);
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec hat[N];
      for (int i = 0; i < N; ++i) hat[i] = bias;
      convolve<N>({above + x * VL, above + g.row + x * VL, above + 2 * g.row + x * VL}, taps, hat);
      for (int i = 0; i < N; ++i) {
        const Vec kept = where_positive(fma(gamma, hat[i], beta), splat(es[x + i]));
        store(to + (x + i) * VL, fma(by_grad, kept, fma(by_hat, hat[i], constant)));
      }
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
    if (!own) return;
    for (int64_t first = 0; first < g.W; first += SPAN) {
      Vec products[9], sum = zero();
      for (int t = 0; t < 9; ++t) products[t] = zero();
      const float *above_span = above + first * VL, *grad_span = to + first * VL;
      auto weights = [&](auto count, int64_t x) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        Vec grad[N], part = zero();
        for (int i = 0; i < N; ++i) {
          grad[i] = load(grad_span + (x + i) * VL);
          part = add(part, grad[i]);
        }
        sum = add(sum, part);
        correlate<N>(
            {above_span + x * VL, above_span + g.row + x * VL, above_span + 2 * g.row + x * VL},
            grad, products);
      };
      const int64_t width = g.W - first < SPAN ? g.W - first : SPAN;
      CASVIT_FOR_PIXEL_RUNS(width, weights);
      sums.add_to(DEPTHWISE, products);
      sums.add_to(DEPTHWISE_BIAS, sum);
      sums.count(width);
    }
  };
  auto make_grad_z = [&](int64_t y) {
    const float *from = grad_sum + y * g.W * VL, *gates = s + y * g.W;
    float* to = grad_z + y * g.W * stride;
    const Taps back(depthwise, true);
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec acc[N];
      for (int i = 0; i < N; ++i)
        acc[i] = mul(fma(load(from + (x + i) * VL), gate, shift), splat(gates[x + i]));
      convolve<N>({ring(y - 1) + x * VL, ring(y) + x * VL, ring(y + 1) + x * VL}, back, acc);
      for (int i = 0; i < N; ++i) store_first(to + (x + i) * stride, acc[i], channels);
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
  };
  make_grad(y_begin - 1);
  make_grad(y_begin);
  for (int64_t y = y_begin; y < y_end; ++y) {
    make_grad(y + 1);
    make_grad_z(y);
  }
  sums.flush();
}

}  // namespace CASVIT_ISA
}  // namespace casvit
