// Batch statistics of the gates' depthwise convolutions, written once over Vec.
#pragma once

#include "mixer.h"
#include "mixing.h"
#include "sums.h"

namespace casvit {
namespace CASVIT_ISA {

static void moments(const Geometry& g, const float* taps, const float* plane, int64_t y_begin,
                    int64_t y_end, double* moments) {
  auto row_above = [&](int64_t y) { return plane + y * g.row; };
  // Deviations from a value out of the middle: squares of the values themselves would drown a
  // variance that is small beside the mean.
  Vec middle[1] = {zero()};
  {
    const float* above = row_above((y_begin + y_end) / 2) + g.W / 2 * VL;
    convolve<1>({above, above + g.row, above + 2 * g.row}, taps, middle);
  }
  double totals[2 * VL];
  Sums<2> sums(totals);
  for (int64_t y = y_begin; y < y_end; ++y) {
    const float* above = row_above(y);
    Vec sum = zero(), square = zero();
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec acc[N];
      for (int i = 0; i < N; ++i) acc[i] = zero();
      const float* const from[3] = {above + x * VL, above + g.row + x * VL,
                                    above + 2 * g.row + x * VL};
      convolve<N>(from, taps, acc);
      for (int i = 0; i < N; ++i) {
        const Vec deviation = sub(acc[i], middle[0]);
        sum = add(sum, deviation);
        square = fma(deviation, deviation, square);
      }
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
    sums.add_to(0, sum);
    sums.add_to(1, square);
    sums.count(g.W);
  }
  sums.flush();
  float shift[VL];
  store(shift, middle[0]);
  const double count = static_cast<double>((y_end - y_begin) * g.W);
  for (int i = 0; i < VL; ++i) {
    const double mean = totals[i] / count;
    moments[i] = static_cast<double>(shift[i]) + mean;
    moments[VL + i] = totals[VL + i] - totals[i] * mean;
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
