// Depthwise 3x3 convolutions on rows of a channel block, and the gradient of their weights.
#pragma once

#include "cpu/layout.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// The 3x3 weights of one channel block; `back`: in reverse order, for the gradient.
struct Taps {
  Vec tap[9];
  explicit Taps(const float* from, bool back = false) {
    for (int t = 0; t < 9; ++t) tap[t] = in_register(load(from + (back ? 8 - t : t) * VL));
  }
};

// N neighbouring output pixels: acc[i] += taps * input around pixel i. Every loaded vector serves
// the three outputs it contributes to. rows[dy] points at the left neighbour of pixel 0.
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

// The weight gradient of `convolve`: sums[t] += own pixel * its neighbour at tap t.
// rows[dy] points at the left neighbour of pixel 0.
template <int N>
CASVIT_INLINE void correlate(const float* const (&rows)[3], const Vec (&own)[N], Vec (&sums)[9]) {
#pragma GCC unroll 16
  for (int j = 0; j < N + 2; ++j) {
#pragma GCC unroll 3
    for (int dy = 0; dy < 3; ++dy) {  // three independent chains of FMAs
      const Vec z = in_register(load(rows[dy] + j * VL));
      if (j < N) sums[3 * dy] = fma(z, own[j], sums[3 * dy]);
      if (j >= 1 && j <= N) sums[3 * dy + 1] = fma(z, own[j - 1], sums[3 * dy + 1]);
      if (j >= 2) sums[3 * dy + 2] = fma(z, own[j - 2], sums[3 * dy + 2]);
    }
  }
}

CASVIT_INLINE void clear_row(const Geometry& g, float* row) {
  std::memset(row, 0, sizeof(float) * static_cast<size_t>(g.row));
}

}  // namespace CASVIT_ISA
}  // namespace casvit
