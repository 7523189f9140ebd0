// Batch statistics of the gates' depthwise convolutions, written once over Vec.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixer/depthwise.h"
#include "cpu/simd/accumulate.h"

namespace casvit {
namespace CASVIT_ISA {

static void moments(const Geometry& g, const float* weights, const float* plane, int64_t y_begin,
                    int64_t y_end, double* moments) {
  const Taps taps(weights);
  auto row_above = [&](int64_t y) { return plane + y * g.row; };
  // Deviations are taken from `centre`, the mean of a few values out of the middle: sums of plain
  // squares cancel where the variance is small beside the mean.
  Vec centre = zero();
  {
    const float* above = row_above((y_begin + y_end) / 2) + (g.W < 7 ? 0 : (g.W - 7) / 2) * VL;
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec acc[N];
      for (int i = 0; i < N; ++i) acc[i] = zero();
      convolve<N>({above + x * VL, above + g.row + x * VL, above + 2 * g.row + x * VL}, taps, acc);
      for (int i = 0; i < N; ++i) centre = add(centre, acc[i]);
    };
    const int64_t count = g.W < 7 ? g.W : 7;
    CASVIT_FOR_PIXEL_RUNS(count, pixels);
    centre = div(centre, splat(static_cast<float>(count)));
  }
  double totals[2 * VL];
  Accumulators<2> sums(totals);
  for (int64_t y = y_begin; y < y_end; ++y)
    for (int64_t first = 0; first < g.W; first += SPAN) {
      const float* above = row_above(y) + first * VL;
      Vec sum = zero(), square = zero();
      auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        Vec acc[N];
        for (int i = 0; i < N; ++i) acc[i] = zero();
        convolve<N>({above + x * VL, above + g.row + x * VL, above + 2 * g.row + x * VL}, taps,
                    acc);
        Vec part = zero(), part_square = zero();
        for (int i = 0; i < N; ++i) {
          const Vec deviation = sub(acc[i], centre);
          part = add(part, deviation);
          part_square = fma(deviation, deviation, part_square);
        }
        sum = add(sum, part);
        square = add(square, part_square);
      };
      const int64_t width = g.W - first < SPAN ? g.W - first : SPAN;
      CASVIT_FOR_PIXEL_RUNS(width, pixels);
      sums.add_to(0, sum);
      sums.add_to(1, square);
      sums.flush();
    }
  float shift[VL];
  store(shift, centre);
  const double count = static_cast<double>((y_end - y_begin) * g.W);
  for (int i = 0; i < VL; ++i) {
    const double mean = totals[i] / count;
    moments[i] = static_cast<double>(shift[i]) + mean;
    moments[VL + i] = totals[VL + i] - totals[i] * mean;
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
