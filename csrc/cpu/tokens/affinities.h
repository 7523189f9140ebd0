// Affinities of tokens to the centres around their cells: a softmax of squared distances.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/math.h"

namespace casvit {
namespace CASVIT_ISA {

// Squared distances of T tokens to M centres one `row` apart, to d[token][d_row]; 2 x 5 fit the
// registers. Differences are squared, so that nothing cancels however large tokens are: an addition
// beside each FMA.
template <int T, int M>
CASVIT_INLINE void squared_distances(const float* const* tokens, const float* centres, int64_t row,
                                     float* d, int64_t d_row) {
  constexpr int64_t CHAIN = 128 * VL;  // as of the GEMM's microkernel
  constexpr int GROUPS = (T * M + VL - 1) / VL;
  alignas(64) float sums[GROUPS * VL * VL], totals[GROUPS * VL];
  for (int i = T * M; i < GROUPS * VL; ++i) store(sums + i * VL, zero());
  for (int64_t begin = 0; begin < row; begin += CHAIN) {
    const int64_t end = begin + CHAIN < row ? begin + CHAIN : row;
    Vec acc[T][M];
#pragma GCC unroll 2
    for (int i = 0; i < T; ++i)
#pragma GCC unroll 5
      for (int j = 0; j < M; ++j) acc[i][j] = zero();
    for (int64_t c = begin; c < end; c += VL) {
      Vec token[T];
#pragma GCC unroll 2
      for (int i = 0; i < T; ++i) {
        token[i] = in_register(load(tokens[i] + c));
        // Those of the next cell: a map of 64 x 64 tokens comes from beyond the L2 cache.
        __builtin_prefetch(tokens[i] + c + T * row, 0, 2);
      }
#pragma GCC unroll 5
      for (int j = 0; j < M; ++j) {
        const Vec centre = in_register(load(centres + j * row + c));
#pragma GCC unroll 2
        for (int i = 0; i < T; ++i) {
          const Vec difference = sub(token[i], centre);
          acc[i][j] = fma(difference, difference, acc[i][j]);
        }
      }
    }
    for (int i = 0; i < T; ++i)
      for (int j = 0; j < M; ++j) {
        float* sum = sums + (i * M + j) * VL;
        store(sum, begin ? add(load(sum), acc[i][j]) : acc[i][j]);
      }
  }
  for (int g = 0; g < GROUPS; ++g) store(totals + g * VL, horizontal_sums(sums + g * VL * VL));
  for (int i = 0; i < T; ++i)
    for (int j = 0; j < M; ++j) d[i * d_row + j] = totals[i * M + j];
}

// The same for any number of centres.
template <int T>
CASVIT_INLINE void squared_distances(const float* const* tokens, const float* centres, int64_t row,
                                     int64_t count, float* d, int64_t d_row) {
  for (; count > 5; count -= 5, centres += 5 * row, d += 5)
    squared_distances<T, 5>(tokens, centres, row, d, d_row);
  switch (count) {
    case 5: return squared_distances<T, 5>(tokens, centres, row, d, d_row);
    case 4: return squared_distances<T, 4>(tokens, centres, row, d, d_row);
    case 3: return squared_distances<T, 3>(tokens, centres, row, d, d_row);
    case 2: return squared_distances<T, 2>(tokens, centres, row, d, d_row);
    default: return squared_distances<T, 1>(tokens, centres, row, d, d_row);
  }
}

// d: `count` squared distances, in place to exp(-temperature (d - the smallest)), and zeros up to a
// whole vector. Returns their sum; NaN where one is.
CASVIT_INLINE float weights_of_distances(float* d, int64_t count, float temperature) {
  const int64_t padded = (count + VL - 1) / VL * VL;
  for (int64_t i = count; i < padded; ++i) d[i] = __builtin_inff();
  Vec least = load(d);
  for (int64_t i = VL; i < padded; i += VL) least = min_keep_nan(least, load(d + i));
  alignas(64) float lanes[VL];
  store(lanes, least);
  float smallest = lanes[0];
  for (int i = 1; i < VL; ++i) smallest = lanes[i] < smallest ? lanes[i] : smallest;
  const Vec scale = splat(-temperature), from = splat(smallest);
  Vec sums = zero();
  for (int64_t i = 0; i < padded; i += VL) {
    const Vec e = exp_to_zero(mul(scale, sub(load(d + i), from)));
    store(d + i, e);
    sums = add(sums, e);
  }
  store(lanes, sums);
  float sum = 0.0f;
  for (int i = 0; i < VL; ++i) sum += lanes[i];
  return sum;
}

// The same to their softmax.
CASVIT_INLINE void softmax_of_distances(float* d, int64_t count, float temperature) {
  const Vec total = splat(weights_of_distances(d, count, temperature));
  for (int64_t i = 0; i < count; i += VL) store(d + i, div(load(d + i), total));
}

// Of the tokens of cells [begin, end) of one row of cells.
static void token_affinities(const TokenMap& m, const TokenArrays& a, float temperature,
                             int64_t cell_row, int64_t begin, int64_t end, float* temp) {
  const Span y = m.tokens_of(0, cell_row), rows = m.around(0, cell_row);
  const int64_t d_row = affinity_row(m), first = m.tokens_of(1, begin).begin;
  // Row by row of the windows: cells side by side share most of its centres.
  for (int64_t centre_row = rows.begin; centre_row < rows.end; ++centre_row)
    for (int64_t cell = begin; cell < end; ++cell) {
      const Span x = m.tokens_of(1, cell), columns = m.around(1, cell);
      const float* centres = a.centres + (centre_row * m.grid[1] + columns.begin) * m.row;
      float* d =
          temp + y.size() * (x.begin - first) * d_row + (centre_row - rows.begin) * columns.size();
      const int64_t count = y.size() * x.size();
      const auto token = [&](int64_t i) {
        return a.tokens + ((y.begin + i / x.size()) * m.size[1] + x.begin + i % x.size()) * m.row;
      };
      for (int64_t i = 0; i < count; i += 2) {
        const float* const tokens[2] = {token(i), token(i + 1 < count ? i + 1 : i)};
        float* to = d + i * d_row;
        if (i + 1 < count) squared_distances<2>(tokens, centres, m.row, columns.size(), to, d_row);
        else squared_distances<1>(tokens, centres, m.row, columns.size(), to, d_row);
      }
    }
  for (int64_t cell = begin; cell < end; ++cell) {
    const Span x = m.tokens_of(1, cell), columns = m.around(1, cell);
    float* d = temp + y.size() * (x.begin - first) * d_row;
    const int64_t skipped = columns.begin - (cell - m.reach);
    for (int64_t at_y = y.begin; at_y < y.end; ++at_y)
      for (int64_t at_x = x.begin; at_x < x.end; ++at_x, d += d_row) {
        softmax_of_distances(d, rows.size() * columns.size(), temperature);
        float* to = a.affinity + (at_y * m.size[1] + at_x) * m.slots();
        std::memset(to, 0, static_cast<size_t>(m.slots()) * 4);
        to += (rows.begin - (cell_row - m.reach)) * m.window() + skipped;
        for (int64_t r = 0; r < rows.size(); ++r)
          std::memcpy(to + r * m.window(), d + r * columns.size(),
                      static_cast<size_t>(columns.size()) * 4);
      }
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
