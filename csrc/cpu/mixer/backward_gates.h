// Backward of the spatial and the channel gates.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixer/depthwise.h"
#include "cpu/simd/accumulate.h"

namespace casvit {
namespace CASVIT_ISA {

// One strip of one gate: the gradient es at the logit of every pixel, the gradient sum es * relu(n)
// of the C -> 1 weights, and BatchNorm's sums of gn and gn n^.
static void backward_gate(const Geometry& g, const TrainingGate& w, const float* z, const float* s,
                          const float* pixel, const float* shift, int64_t strip, float* logit,
                          float* sums, float* temp) {
  const Strips strips = make_strips(g);
  const int64_t y0 = strip / strips.across * strips.rows,
                x0 = strip % strips.across * strips.columns;
  const int64_t rows = y0 + strips.rows < g.H ? strips.rows : g.H - y0;
  const int64_t columns = x0 + strips.columns < g.W ? strips.columns : g.W - x0;
  const int64_t pixels = rows * columns;
  float* partial = temp;  // [pixel][lane]; VL spare pixels here and in the next two
  float* gate = partial + (pixels + VL) * VL;
  float* gradient = gate + pixels + VL;

  for (int64_t block = 0; block < g.blocks; ++block) {
    const Vec weight = load(shift + block * VL);
    for (int64_t y = 0; y < rows; ++y) {
      const float* from = z + block * g.plane + (y0 + y + 1) * g.row + (x0 + 1) * VL;
      float* to = partial + y * columns * VL;
      if (block == 0)
        for (int64_t x = 0; x < columns; ++x) store(to + x * VL, mul(load(from + x * VL), weight));
      else
        for (int64_t x = 0; x < columns; ++x)
          store(to + x * VL, fma(load(from + x * VL), weight, load(to + x * VL)));
    }
  }
  for (int64_t y = 0; y < rows; ++y) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(columns);
    std::memcpy(gate + y * columns, s + (y0 + y) * g.W + x0, bytes);
    std::memcpy(gradient + y * columns, pixel + (y0 + y) * g.W + x0, bytes);
  }
  for (int64_t i = pixels; i < pixels + VL; ++i) {
    store(partial + i * VL, zero());
    gate[i] = gradient[i] = 0.0f;
  }
  for (int64_t i = 0; i < pixels; i += VL) {
    const Vec open = load(gate + i);
    const Vec slope = mul(open, sub(splat(1.0f), open));
    store(gradient + i, mul(add(load(gradient + i), horizontal_sums(partial + i * VL)), slope));
  }
  for (int64_t y = 0; y < rows; ++y)
    std::memcpy(logit + (y0 + y) * g.W + x0, gradient + y * columns,
                sizeof(float) * static_cast<size_t>(columns));

  for (int64_t block = 0; block < g.blocks; ++block) {
    const int64_t at = block * VL;
    const Taps taps(w.normalized + block * 9 * VL);
    const Vec bias = load(w.normalized_bias + at);
    const Vec gamma = load(w.gamma + at), beta = load(w.beta + at);
    double totals[GATE_SUMS * VL];
    Accumulators<GATE_SUMS> kept_sums(totals);
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t first = 0; first < columns; first += SPAN) {
        const float* above = z + block * g.plane + (y0 + y) * g.row + (x0 + first) * VL;
        const float* es = gradient + y * columns + first;
        Vec sum[GATE_SUMS] = {zero(), zero(), zero()};
        auto run = [&](auto count, int64_t x) __attribute__((always_inline)) {
          constexpr int N = decltype(count)::value;
          Vec hat[N];
          for (int i = 0; i < N; ++i) hat[i] = bias;
          convolve<N>({above + x * VL, above + g.row + x * VL, above + 2 * g.row + x * VL}, taps,
                      hat);
          Vec part[GATE_SUMS] = {zero(), zero(), zero()};
          for (int i = 0; i < N; ++i) {
            const Vec n = fma(gamma, hat[i], beta), e = splat(es[x + i]);
            const Vec kept = where_positive(n, e);
            part[SPATIAL_WEIGHT] = fma(max_keep_nan(zero(), n), e, part[SPATIAL_WEIGHT]);
            part[GRAD_N] = add(part[GRAD_N], kept);
            part[GRAD_N_HAT] = fma(kept, hat[i], part[GRAD_N_HAT]);
          }
          for (int j = 0; j < GATE_SUMS; ++j) sum[j] = add(sum[j], part[j]);
        };
        const int64_t width = columns - first < SPAN ? columns - first : SPAN;
        CASVIT_FOR_PIXEL_RUNS(width, run);
        kept_sums.add_to(0, sum);
        kept_sums.count(width);
      }
    kept_sums.flush();
    for (int i = 0; i < VL; ++i) {
      const double spatial = static_cast<double>(w.spatial[at + i]);
      sums[SPATIAL_WEIGHT * g.padded() + at + i] =
          static_cast<float>(totals[SPATIAL_WEIGHT * VL + i]);
      sums[GRAD_N * g.padded() + at + i] = static_cast<float>(totals[GRAD_N * VL + i] * spatial);
      sums[GRAD_N_HAT * g.padded() + at + i] =
          static_cast<float>(totals[GRAD_N_HAT * VL + i] * spatial);
    }
  }
}

template <int M>
CASVIT_INLINE void channel_gate_backward_of(const Geometry& g, const float* grad,
                                            const float* pooled, const float* weight, float scale,
                                            int64_t block, bool add_up, float* shift, float* to) {
  const int64_t padded = g.padded(), left = g.C - block * VL;
  const int channels = static_cast<int>(left < VL ? left : VL);
  weight += block * VL;
  Vec sum[M], mean[M];
  for (int m = 0; m < M; ++m) {
    sum[m] = zero();
    mean[m] = load(pooled + m * padded + block * VL);
  }
  for (int64_t o = 0; o < g.C; ++o) {
    const Vec row = load_first_as_float(weight + o * g.C, channels);
    for (int m = 0; m < M; ++m) sum[m] = fma(row, splat(grad[m * padded + o]), sum[m]);
    if (!to) continue;
    float* p = to + o * g.C + block * VL;
    Vec product = add_up ? load_first_as_float(p, channels) : zero();
    for (int m = 0; m < M; ++m) product = fma(mean[m], splat(grad[m * padded + o]), product);
    store_first(p, product, channels);
  }
  for (int m = 0; m < M; ++m) store(shift + m * padded + block * VL, mul(sum[m], splat(scale)));
}
static void channel_gate_backward(const Geometry& g, const float* grad, const float* pooled,
                                  const float* weight, float scale, int64_t images, int64_t block,
                                  float* shift, float* to) {
  for (int64_t i = 0; i < images;) {
    const int64_t at = i * g.padded();
    const bool four = i + 4 <= images;
    auto* f = four ? channel_gate_backward_of<4> : channel_gate_backward_of<1>;
    f(g, grad + at, pooled + at, weight, scale, block, i > 0, shift + at, to);
    i += four ? 4 : 1;
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
