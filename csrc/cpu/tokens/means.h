// Centres: the first ones by average pooling, then means of tokens weighted by their affinities.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// `channels` values of any dtype to a row of floats, with zeros up to its end.
template <class T>
CASVIT_INLINE void widen_row(const T* from, int64_t channels, int64_t row, float* to) {
  int64_t c = 0;
  for (; c + VL <= channels; c += VL) store(to + c, load_as_float(from + c));
  for (; c < row; c += VL) {
    const int64_t left = channels - c;
    store(to + c, left > 0 ? load_first_as_float(from + c, static_cast<int>(left)) : zero());
  }
}
static void widen_token(const void* from, DType dtype, int64_t channels, int64_t row, float* to) {
  switch (dtype) {
    case DType::F32: return widen_row(static_cast<const float*>(from), channels, row, to);
    case DType::BF16: return widen_row(static_cast<const Bf16*>(from), channels, row, to);
    case DType::F16: return widen_row(static_cast<const F16*>(from), channels, row, to);
  }
}

template <class T>
CASVIT_INLINE void narrow_row(const float* from, int64_t channels, T* to) {
  for (int64_t c = 0; c < channels; c += VL) {
    const int64_t left = channels - c;
    store_first(to + c, load(from + c), static_cast<int>(left < VL ? left : VL));
  }
}
static void narrow_centre(const float* from, DType dtype, int64_t channels, void* to) {
  switch (dtype) {
    case DType::F32: return narrow_row(from, channels, static_cast<float*>(to));
    case DType::BF16: return narrow_row(from, channels, static_cast<Bf16*>(to));
    case DType::F16: return narrow_row(from, channels, static_cast<F16*>(to));
  }
}

// First centres: cells [begin, end) of one row.
static void pool_tokens(const TokenMap& m, const TokenArrays& a, int64_t cell_row, int64_t begin,
                        int64_t end) {
  const Span y = m.pooled(0, cell_row);
  for (int64_t cell = begin; cell < end; ++cell) {
    const Span x = m.pooled(1, cell);
    const Vec count = splat(static_cast<float>(y.size() * x.size()));
    float* to = a.centres + (cell_row * m.grid[1] + cell) * m.row;
    for (int64_t c = 0; c < m.row; c += VL) {
      Vec sum = zero();
      for (int64_t at_y = y.begin; at_y < y.end; ++at_y) {
        Vec line = zero();
        for (int64_t at_x = x.begin; at_x < x.end; ++at_x)
          line = add(line, load(a.tokens + (at_y * m.size[1] + at_x) * m.row + c));
        sum = add(sum, line);
      }
      store(to + c, div(sum, count));
    }
  }
}

// Lists the tokens of centres `cell` and, where there is one, cell + 1, from `to` on, by weights
// that add up to 1. Returns the list's end.
static WeightedToken* weigh_tokens(const TokenMap& m, const TokenArrays& a, int64_t cell_row,
                                   int64_t cell, WeightedToken* to, WeightedTokens* found) {
  const bool pair = cell + 1 < m.grid[1];
  const Span rows = m.around(0, cell_row), first = m.around(1, cell);
  const Span second = pair ? m.around(1, cell + 1) : Span{first.end, first.end};
  const Span parts[3] = {{first.begin, second.begin < first.end ? second.begin : first.end},
                         {second.begin < first.end ? second.begin : first.end, first.end},
                         {first.end > second.begin ? first.end : second.begin, second.end}};
  double totals[2] = {0.0, 0.0};
  for (int part = 0; part < 3; ++part) {
    found->begin[part] = to;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Span y = m.tokens_of(0, r);
      for (int64_t at_y = y.begin; at_y < y.end; ++at_y)
        for (int64_t k = parts[part].begin; k < parts[part].end; ++k) {
          const Span x = m.tokens_of(1, k);
          // The place of these centres in the window of cell (r, k).
          const int64_t slot = (cell_row - r + m.reach) * m.window() + cell - k + m.reach;
          for (int64_t at_x = x.begin; at_x < x.end; ++at_x, ++to) {
            const int64_t token = at_y * m.size[1] + at_x;
            const float* affinity = a.affinity + token * m.slots() + slot;
            *to = {a.tokens + token * m.row,
                   {part < 2 ? affinity[0] : 0.0f, part > 0 && pair ? affinity[1] : 0.0f}};
            for (int i = 0; i < 2; ++i) totals[i] += static_cast<double>(to->weight[i]);
          }
        }
    }
  }
  found->begin[3] = to;
  for (int i = 0; i < 2; ++i) {
    found->moves[i] = totals[i] > 0.0;
    const double scale = 1.0 / totals[i];
    for (WeightedToken* t = found->begin[0]; t != to; ++t)
      t->weight[i] = static_cast<float>(static_cast<double>(t->weight[i]) * scale);
  }
  return to;
}

// Adds V vectors of the tokens of a list to the sums of the first and of the second centre.
template <int V, bool FIRST, bool SECOND>
CASVIT_INLINE void add_weighted(const WeightedToken* t, const WeightedToken* end, int64_t c,
                                Vec (&sums)[2][V], float* totals) {
  while (t != end) {
    const WeightedToken* stop = end - t > 128 ? t + 128 : end;
    for (; t != stop; ++t) {
      const float* token = t->row + c;
      const Vec a = FIRST ? splat(t->weight[0]) : zero();
      const Vec b = SECOND ? splat(t->weight[1]) : zero();
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec value = in_register(load(token + v * VL));
        if (FIRST) sums[0][v] = fma(a, value, sums[0][v]);
        if (SECOND) sums[1][v] = fma(b, value, sums[1][v]);
      }
    }
    if (t == end) break;
    // Long chains of additions in float lose digits: they are cut.
    for (int i = 0; i < 2; ++i)
      for (int v = 0; v < V; ++v) {
        float* total = totals + (i * V + v) * VL;
        store(total, add(load(total), sums[i][v]));
        sums[i][v] = zero();
      }
  }
}

template <int V>
CASVIT_INLINE void weighted_mean(const WeightedTokens& w, int64_t c, float* first, float* second) {
  alignas(64) float totals[2 * V * VL] = {};
  Vec sums[2][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sums[0][v] = sums[1][v] = zero();
  add_weighted<V, true, false>(w.begin[0], w.begin[1], c, sums, totals);
  add_weighted<V, true, true>(w.begin[1], w.begin[2], c, sums, totals);
  add_weighted<V, false, true>(w.begin[2], w.begin[3], c, sums, totals);
  float* const to[2] = {first, second};
  for (int i = 0; i < 2; ++i)
    if (w.moves[i])
      for (int v = 0; v < V; ++v)
        store(to[i] + c + v * VL, add(load(totals + (i * V + v) * VL), sums[i][v]));
}

// New centres: cells [begin, end) of one row, from an even one on. One that no token has any
// affinity to stays where it is.
static void weighted_means(const TokenMap& m, const TokenArrays& a, int64_t cell_row, int64_t begin,
                           int64_t end, void* temp) {
  constexpr int V = VL == 16 ? 8 : 4;
  const int64_t pairs = (end - begin + 1) / 2;
  WeightedTokens* lists = static_cast<WeightedTokens*>(temp);
  WeightedToken* to = reinterpret_cast<WeightedToken*>(lists + pairs);
  for (int64_t p = 0; p < pairs; ++p)
    to = weigh_tokens(m, a, cell_row, begin + 2 * p, to, lists + p);
  float* centres = a.centres + (cell_row * m.grid[1] + begin) * m.row;
  const Span below =
      cell_row + m.reach + 1 < m.grid[0] ? m.tokens_of(0, cell_row + m.reach + 1) : Span{0, 0};
  // A few channels of all tokens at a time: pairs side by side share most of their tokens.
  for (int64_t c = 0; c < m.row;) {
    const int64_t vectors = (m.row - c) / VL;
    for (int64_t p = 0; p < pairs; ++p) {
      float* first = centres + 2 * p * m.row;
      // The tokens that come into the window with the next row of cells.
      const int64_t cell = begin + 2 * p, last = cell + 1 < end ? cell + 1 : cell;
      for (int64_t y = below.begin; y < below.end; ++y)
        for (int64_t x = m.tokens_of(1, cell).begin; x < m.tokens_of(1, last).end; ++x)
          for (int64_t i = 0; i < V * VL && c + i < m.row; i += 16)
            __builtin_prefetch(a.tokens + (y * m.size[1] + x) * m.row + c + i, 0, 2);
      if (vectors >= V) weighted_mean<V>(lists[p], c, first, first + m.row);
      else if (vectors >= 2) weighted_mean<2>(lists[p], c, first, first + m.row);
      else weighted_mean<1>(lists[p], c, first, first + m.row);
    }
    c += VL * (vectors >= V ? V : vectors >= 2 ? 2 : 1);
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
