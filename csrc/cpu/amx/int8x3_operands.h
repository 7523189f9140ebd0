// int8x3: float32 GEMMs on the int8 path of the matrix unit (AMX), in block fixed point.
//
// AMX multiplies int8 into int32 at twice the rate of bf16. K is cut in slices. Within a slice,
// each row of the left operand and each column of the right one is quantised with a step of its
// own, its largest magnitude / FULL_SCALE, to integers of 24 bits: three signed base-256 digits. Of
// the nine products of digits the six that reach float32 precision are accumulated exactly, by
// order:
//   0: high high    1: high middle + middle high    2: high low + middle middle + low high
// Slices are added up in float32. Errors are those of float32 sums unless a row or column has an
// outlier, for which the step would be too coarse for its other values: see Range::fits(). Operands
// that do not fit take the split-bf16 path (bf16x3.h).
#pragma once

#include <cmath>

#include "cpu/amx/tile.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int INT8_TILE_K = 64;                  // K of a tile
constexpr float FULL_SCALE = 127.0f * 65536.0f;  // so that no digit exceeds 127
// A value is an outlier above OUTLIER_RATIO * sqrt(count) times the mean magnitude of its row or
// column: the error of a float32 sum of that many values grows with the square root, too.
constexpr float OUTLIER_RATIO = 2.0f;

// A depth tile, 64 of K, is three tiles: the high, middle and low digits.
constexpr int64_t DIGITS_BYTES = 3 * TILE_BYTES;
constexpr int64_t HIGH_DIGIT = 0, MIDDLE_DIGIT = TILE_BYTES, LOW_DIGIT = 2 * TILE_BYTES;

// K of a slice: in longer ones the largest value, and with it the step, would be larger. The last
// slice takes a rest of less than TILE, which is too short to judge outliers.
constexpr int64_t SLICE_K = 2 * INT8_TILE_K, MAX_SLICE_K = SLICE_K + TILE - 1;
static_assert(3 * MAX_SLICE_K * 128 * 128 < 1 << 24, "sums must be exact as float32");
struct Int8Depth {
  int64_t k, tiles, slices;
  explicit Int8Depth(int64_t k)
      : k(k),
        tiles((k + INT8_TILE_K - 1) / INT8_TILE_K),
        slices(k < SLICE_K ? 1 : (k - TILE + SLICE_K) / SLICE_K) {}
  int64_t bytes() const { return tiles * DIGITS_BYTES; }
  // K of the slice that begins at `begin`.
  int64_t length(int64_t begin) const { return begin / SLICE_K + 1 < slices ? SLICE_K : k - begin; }
};

// Up to 48 channels, the passes of split bf16 are as fast as six of int8 and their conversion.
static bool may_use_int8(int64_t C, Precision precision) {
  return precision == Precision::F32 && C > 48;
}

// The largest magnitude and the sum of magnitudes of 16 rows or columns, one in each lane.
struct Range {
  Vec largest = zero(), sum = zero();
  inline __attribute__((always_inline)) void include(Vec a) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(a));
    sum = add(sum, _mm512_abs_ps(a));
  }
  bool fits(int64_t count) const {
    const Vec limit = mul(sum, splat(OUTLIER_RATIO / std::sqrt(static_cast<float>(count))));
    const Vec most =
        min_keep_nan(splat(1e25f), limit);  // a NaN is in every sum and fails the comparison
    const __mmask16 good = _mm512_cmp_ps_mask(largest, most, _CMP_LE_OQ);
    const __mmask16 underflows = _mm512_cmp_ps_mask(largest, splat(1e-25f), _CMP_LT_OQ);
    return (good & ~(underflows & _mm512_cmp_ps_mask(largest, zero(), _CMP_NEQ_OQ))) == 0xffff;
  }
  // 1 / step. Infinite where all values are zero: digits are then arbitrary, and the step is zero.
  Vec scale() const { return div(splat(FULL_SCALE), largest); }
  Vec step() const { return div(splat(1.0f), scale()); }
};
// Reduces 16 rows, each with its values in the lanes, to one lane each.
CASVIT_INLINE Range reduce_lanes(const Range (&rows)[TILE]) {
  Vec largest[TILE], sum[TILE];
  for (int i = 0; i < TILE; ++i) largest[i] = rows[i].largest, sum[i] = rows[i].sum;
  transpose(largest);
  transpose(sum);
  Range range;
  for (int i = 0; i < TILE; ++i) {
    range.largest = _mm512_max_ps(range.largest, largest[i]);
    range.sum = add(range.sum, sum[i]);
  }
  return range;
}

// The digits of 64 values v[j] lane i, rounded, as one vector for each order of digits, in which
// those of v[0], v[2], v[1], v[3] at lane i are neighbours. Both operands have this order.
struct Digits {
  __m512i high, middle, low;
};
CASVIT_INLINE Digits digits(const Vec (&v)[4]) {
  __m512i n[4], lower[2], upper[2];
  // Adding 128 to a digit carries what exceeds a signed digit into the next one.
  for (int j = 0; j < 4; ++j)
    n[j] = _mm512_add_epi32(_mm512_cvtps_epi32(v[j]), _mm512_set1_epi32(0x8080));
  for (int j = 0; j < 2; ++j) {
    lower[j] = _mm512_mask_blend_epi16(0xaaaaaaaau, n[2 * j], _mm512_slli_epi32(n[2 * j + 1], 16));
    upper[j] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(n[2 * j], 16), n[2 * j + 1]);
  }
  constexpr uint64_t odd = 0xaaaaaaaaaaaaaaaau;
  const __m512i half = _mm512_set1_epi8(-128);
  Digits d;
  d.high = _mm512_mask_blend_epi8(odd, upper[0], _mm512_slli_epi16(upper[1], 8));
  d.middle = _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(lower[0], 8), lower[1]);
  d.low = _mm512_mask_blend_epi8(odd, lower[0], _mm512_slli_epi16(lower[1], 8));
  d.middle = _mm512_xor_si512(d.middle, half);
  d.low = _mm512_xor_si512(d.low, half);
  return d;
}
CASVIT_INLINE void store_digits(const Digits& d, unsigned char* tile_row) {
  _mm512_storeu_si512(tile_row + HIGH_DIGIT, d.high);
  _mm512_storeu_si512(tile_row + MIDDLE_DIGIT, d.middle);
  _mm512_storeu_si512(tile_row + LOW_DIGIT, d.low);
}

// The left operand, in tiles of 16 rows.
struct LeftOperand {
  Int8Depth depth;
  int64_t rows, tiles;
  int64_t* to;            // where each row of the result goes
  float* steps;           // [slice][row]
  unsigned char* panels;  // [row tile][depth tile][digit][16 rows][64]; one more tile may be read

  static int64_t bytes(const Int8Depth& depth, int64_t rows) {
    const int64_t tiles = (rows + TILE - 1) / TILE;
    return tiles * TILE * (8 + 4 * depth.slices) + (tiles + 1) * depth.bytes();
  }
  LeftOperand(const Int8Depth& depth, int64_t rows, void* memory)
      : depth(depth), rows(rows), tiles((rows + TILE - 1) / TILE) {
    to = static_cast<int64_t*>(memory);
    steps = reinterpret_cast<float*>(to + tiles * TILE);
    panels = reinterpret_cast<unsigned char*>(steps + depth.slices * tiles * TILE);
  }
  // Packs a slice of a row tile, from K index n on. load_k(n, v): v[i] are values n to n + 15 of
  // row i, zeros past the end. range: of the slice; k_scale: see QkvGemmKernels::scales_k, or null.
  template <class F>
  void pack_slice(int64_t tile, int64_t n, const Range& range, const float* k_scale,
                  const F& load_k) const {
    // Sums by order are scaled by 256 per order; the lowest counts 1 / 65536 of the highest.
    store(steps + (n / SLICE_K * tiles + tile) * TILE, mul(range.step(), splat(65536.0f)));
    alignas(64) float scale[TILE];
    store(scale, range.scale());
    unsigned char* tile_row = panels + tile * depth.bytes() + n / INT8_TILE_K * DIGITS_BYTES;
    for (const int64_t end = n + depth.length(n); n < end;
         n += INT8_TILE_K, tile_row += DIGITS_BYTES) {
      Vec v[4][TILE], factor[4];
      for (int j = 0; j < 4; ++j) {
        load_k(n + j * TILE, v[j]);
        factor[j] = k_scale ? load(k_scale + n + j * TILE) : splat(1.0f);
      }
      for (int i = 0; i < TILE; ++i) {
        const Vec own = splat(scale[i]);  // scale * factor may overflow
        store_digits(digits({mul(mul(v[0][i], factor[0]), own), mul(mul(v[1][i], factor[1]), own),
                             mul(mul(v[2][i], factor[2]), own), mul(mul(v[3][i], factor[3]), own)}),
                     tile_row + i * 64);
      }
    }
  }
};

// The right operand, in blocks of 16 columns: for each slice the steps of the columns, then [depth
// tile][digit][16][16 columns][4]. A negative step marks columns that do not fit.
constexpr int64_t STEP_BYTES = 64;
constexpr int64_t SLICE_BYTES = STEP_BYTES + SLICE_K / INT8_TILE_K * DIGITS_BYTES;
static int64_t block_bytes(const Int8Depth& depth) {
  return depth.slices * STEP_BYTES + depth.bytes();
}
CASVIT_INLINE Vec steps(const unsigned char* slice) {
  return load(reinterpret_cast<const float*>(slice));
}
static bool is_int8(const unsigned char* block) {
  return *reinterpret_cast<const float*>(block) >= 0.0f;
}
// Packs a block; false if it does not fit. load_k(n, v): v[i] are the values n + i of the 16
// columns, zeros past the end. They are divided by k_scale, which may be null.
template <class F>
static bool pack_columns(const Int8Depth& depth, const F& load_k, const float* k_scale,
                         unsigned char* block) {
  unsigned char* slice = block;
  for (int64_t s = 0; s < depth.slices; ++s, slice += SLICE_BYTES) {
    const int64_t begin = s * SLICE_K;
    const int64_t end = begin + depth.length(begin);
    Vec v[SLICE_K / TILE + 1][TILE];
    Range range;
    for (int64_t n = begin; n < end; n += TILE) {
      Vec(&own)[TILE] = v[(n - begin) / TILE];
      load_k(n, own);
      for (int i = 0; i < TILE; ++i) {
        if (k_scale) own[i] = mul(own[i], splat(1.0f / k_scale[n + i]));
        range.include(own[i]);
      }
    }
    if (!range.fits(end - begin)) {
      store(reinterpret_cast<float*>(block), splat(-1.0f));
      return false;
    }
    store(reinterpret_cast<float*>(slice), range.step());
    unsigned char* tile_row = slice + STEP_BYTES;
    for (int64_t n = begin; n < end; n += INT8_TILE_K, tile_row += DIGITS_BYTES) {
      const Vec(*four)[TILE] = v + (n - begin) / TILE;
      auto at = [&](int j, int i) __attribute__((always_inline)) {
        return n + j * TILE < end ? mul(four[j][i], range.scale()) : zero();
      };
      for (int i = 0; i < TILE; ++i)
        store_digits(digits({at(0, i), at(1, i), at(2, i), at(3, i)}), tile_row + i * 64);
    }
  }
  return true;
}

struct RightOperand {
  const unsigned char* blocks;
  int64_t next;   // from block to block, in bytes
  int64_t count;  // blocks
};

}  // namespace CASVIT_ISA
}  // namespace casvit
