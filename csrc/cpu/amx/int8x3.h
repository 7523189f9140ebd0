// Float32 products on the matrix unit (AMX) in fixed point.
//
// The unit multiplies bytes into int32, twice as many at a time as bf16 numbers. The depth is cut
// in slices. In each, every row of the left operand and every column of the right one is measured
// in units of its own, of which its largest number has FULL, and rounded to integers of 24 bits:
// three signed digits of base 256. Of the nine products of digits the six that reach float32
// precision are summed, without any rounding, by order:
//   0: high high    1: high middle + middle high    2: high low + middle middle + low high
// The slices are summed in float32. Errors are like those of float32 sums as long as no number
// outshines the others of its row or column by far; else the unit is too coarse for these: see
// Range::fits().
#pragma once

#include <cmath>

#include "cpu/amx/tile.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int FIXED_DEPTH = 64;            // numbers of a row in one tile
constexpr float FULL = 127.0f * 65536.0f;  // so that no digit is above 127
// A number outshines others from this many times the mean magnitude on, times the square root of
// how many are summed: float32 sums of many lose digits, too.
constexpr float OUTSHINES = 2.0f;

// A depth tile is three tiles: the high, middle and low digits of 64 numbers.
constexpr int64_t DIGITS_BYTES = 3 * TILE_BYTES;
constexpr int64_t HIGH_DIGIT = 0, MIDDLE_DIGIT = TILE_BYTES, LOW_DIGIT = 2 * TILE_BYTES;

// Numbers of a slice: in a larger one the largest would be larger. The last takes what is too short
// to tell what outshines what.
constexpr int64_t SLICE = 2 * FIXED_DEPTH, LONGEST = SLICE + TILE - 1;
static_assert(3 * LONGEST * 128 * 128 < 1 << 24, "sums must be exact as float32");
struct FixedDepth {
  int64_t numbers, tiles, slices;
  explicit FixedDepth(int64_t numbers)
      : numbers(numbers),
        tiles((numbers + FIXED_DEPTH - 1) / FIXED_DEPTH),
        slices(numbers < SLICE ? 1 : (numbers - TILE + SLICE) / SLICE) {}
  int64_t bytes() const { return tiles * DIGITS_BYTES; }
  // Numbers of the slice that begins with this one.
  int64_t length(int64_t begin) const {
    return begin / SLICE + 1 < slices ? SLICE : numbers - begin;
  }
};

// Up to 48 channels nine passes over parts are as quick as six and their conversion.
static bool may_be_fixed(int64_t C, Product kind) { return kind == Product::F32 && C > 48; }

// The magnitudes in 16 rows or columns, one for each lane.
struct Range {
  Vec top = zero(), sum = zero();
  inline __attribute__((always_inline)) void include(Vec a) {
    top = _mm512_max_ps(top, _mm512_abs_ps(a));
    sum = add(sum, _mm512_abs_ps(a));
  }
  bool fits(int64_t numbers) const {
    const Vec near = mul(sum, splat(OUTSHINES / std::sqrt(static_cast<float>(numbers))));
    const Vec most = min_keep_nan(splat(1e25f), near);  // NaN is in every sum
    const __mmask16 good = _mm512_cmp_ps_mask(top, most, _CMP_LE_OQ);
    const __mmask16 tiny = _mm512_cmp_ps_mask(top, splat(1e-25f), _CMP_LT_OQ);
    return (good & ~(tiny & _mm512_cmp_ps_mask(top, zero(), _CMP_NEQ_OQ))) == 0xffff;
  }
  // Units in one. Infinite where all is zero: the digits are then arbitrary, and the unit is zero.
  Vec scale() const { return div(splat(FULL), top); }
  Vec unit() const { return div(splat(1.0f), scale()); }
};
// Of 16 rows whose numbers are in the lanes.
CASVIT_INLINE Range across(const Range (&rows)[TILE]) {
  Vec top[TILE], sum[TILE];
  for (int i = 0; i < TILE; ++i) top[i] = rows[i].top, sum[i] = rows[i].sum;
  transpose(top);
  transpose(sum);
  Range range;
  for (int i = 0; i < TILE; ++i) {
    range.top = _mm512_max_ps(range.top, top[i]);
    range.sum = add(range.sum, sum[i]);
  }
  return range;
}

// The digits of 64 numbers v[j][i], rounded: a line for each place, with the digits of
// v[0][i], v[2][i], v[1][i], v[3][i] side by side. Left and right share this order.
struct Digits {
  __m512i high, middle, low;
};
CASVIT_INLINE Digits digits(const Vec (&v)[4]) {
  __m512i n[4], lower[2], upper[2];
  // Adding half of 256 to a place carries what is too large for a signed digit to the next.
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
CASVIT_INLINE void put_digits(const Digits& d, unsigned char* line) {
  _mm512_storeu_si512(line + HIGH_DIGIT, d.high);
  _mm512_storeu_si512(line + MIDDLE_DIGIT, d.middle);
  _mm512_storeu_si512(line + LOW_DIGIT, d.low);
}

// The left operand, in tiles of 16 rows.
struct Left {
  FixedDepth depth;
  int64_t rows, tiles;
  int64_t* to;            // where the results of each row go
  float* units;           // [slice][row]
  unsigned char* panels;  // [row tile][depth tile][digit][16 rows][64]; one more tile may be read

  static int64_t bytes(const FixedDepth& depth, int64_t rows) {
    const int64_t tiles = (rows + TILE - 1) / TILE;
    return tiles * TILE * (8 + 4 * depth.slices) + (tiles + 1) * depth.bytes();
  }
  Left(const FixedDepth& depth, int64_t rows, void* memory)
      : depth(depth), rows(rows), tiles((rows + TILE - 1) / TILE) {
    to = static_cast<int64_t*>(memory);
    units = reinterpret_cast<float*>(to + tiles * TILE);
    panels = reinterpret_cast<unsigned char*>(units + depth.slices * tiles * TILE);
  }
  // One slice of one tile, from number n on. some(n, v): v[i] are the numbers n to n + 15 of row i,
  // zeros past the end. range, and balance, which may be null: of all numbers.
  template <class F>
  void put(int64_t tile, int64_t n, const Range& range, const float* balance, const F& some) const {
    // The lowest order of digits counts in 65536ths of a product of units.
    store(units + (n / SLICE * tiles + tile) * TILE, mul(range.unit(), splat(65536.0f)));
    alignas(64) float scale[TILE];
    store(scale, range.scale());
    unsigned char* lines = panels + tile * depth.bytes() + n / FIXED_DEPTH * DIGITS_BYTES;
    for (const int64_t end = n + depth.length(n); n < end;
         n += FIXED_DEPTH, lines += DIGITS_BYTES) {
      Vec v[4][TILE], factor[4];
      for (int j = 0; j < 4; ++j) {
        some(n + j * TILE, v[j]);
        factor[j] = balance ? load(balance + n + j * TILE) : splat(1.0f);
      }
      for (int i = 0; i < TILE; ++i) {
        const Vec own = splat(scale[i]);  // its product with a factor may be out of range
        put_digits(digits({mul(mul(v[0][i], factor[0]), own), mul(mul(v[1][i], factor[1]), own),
                           mul(mul(v[2][i], factor[2]), own), mul(mul(v[3][i], factor[3]), own)}),
                   lines + i * 64);
      }
    }
  }
};

// The right operand, in blocks of 16 columns: of each slice their units, then [depth
// tile][digit][16][16 columns][4]. A negative unit: the columns do not fit.
constexpr int64_t UNIT_BYTES = 64;
constexpr int64_t SLICE_BYTES = UNIT_BYTES + SLICE / FIXED_DEPTH * DIGITS_BYTES;
static int64_t block_bytes(const FixedDepth& depth) {
  return depth.slices * UNIT_BYTES + depth.bytes();
}
CASVIT_INLINE Vec units(const unsigned char* slice) {
  return load(reinterpret_cast<const float*>(slice));
}
static bool in_fixed_point(const unsigned char* block) {
  return *reinterpret_cast<const float*>(block) >= 0.0f;
}
// some(n, v): v[i] are the numbers n + i of all 16 columns, zeros past the end; balance, which may
// be null: what they are divided by.
template <class F>
static bool pack_columns(const FixedDepth& depth, const F& some, const float* balance,
                         unsigned char* block) {
  unsigned char* slice = block;
  for (int64_t s = 0; s < depth.slices; ++s, slice += SLICE_BYTES) {
    const int64_t begin = s * SLICE;
    const int64_t end = begin + depth.length(begin);
    Vec v[SLICE / TILE + 1][TILE];
    Range range;
    for (int64_t n = begin; n < end; n += TILE) {
      Vec(&own)[TILE] = v[(n - begin) / TILE];
      some(n, own);
      for (int i = 0; i < TILE; ++i) {
        if (balance) own[i] = mul(own[i], splat(1.0f / balance[n + i]));
        range.include(own[i]);
      }
    }
    if (!range.fits(end - begin)) {
      store(reinterpret_cast<float*>(block), splat(-1.0f));
      return false;
    }
    store(reinterpret_cast<float*>(slice), range.unit());
    unsigned char* lines = slice + UNIT_BYTES;
    for (int64_t n = begin; n < end; n += FIXED_DEPTH, lines += DIGITS_BYTES) {
      const Vec(*four)[TILE] = v + (n - begin) / TILE;
      auto at = [&](int j, int i) __attribute__((always_inline)) {
        return n + j * TILE < end ? mul(four[j][i], range.scale()) : zero();
      };
      for (int i = 0; i < TILE; ++i)
        put_digits(digits({at(0, i), at(1, i), at(2, i), at(3, i)}), lines + i * 64);
    }
  }
  return true;
}

struct Right {
  const unsigned char* blocks;
  int64_t next;   // from block to block, in bytes
  int64_t count;  // blocks
};

// Where results go: row r of block b to base + to[r] + b * next.
struct Results {
  float* base;
  int64_t next;
  const float* bias;  // of 16 columns each; may be null
  bool add_up;        // to what is there, instead of the bias
};

// The sums of one block and up to 32 rows on their way to memory.
struct Conversion {
  const int32_t* sums = nullptr;  // [order][32][16]
  const float* row_units = nullptr;
  const int64_t* to = nullptr;
  float* base = nullptr;
  Vec units = zero(), bias = zero();
  int rows = 0;

  inline __attribute__((always_inline)) void convert(int row, bool add_up) const {
    const Vec sum =
        fma(fma(order(0, row), splat(256.0f), order(1, row)), splat(256.0f), order(2, row));
    float* p = base + to[row];
    // One unit at a time: their product may be out of range.
    store(p, fma(mul(sum, splat(row_units[row])), units, add_up ? load(p) : bias));
  }

 private:
  inline __attribute__((always_inline)) Vec order(int i, int row) const {
    return _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + i * 512 + row * VL));
  }
};

constexpr int64_t SUMS_BYTES = 6 * TILE_BYTES + 256;  // two buffers, not a multiple of 4096 apart

// One slice of all rows and blocks. Accumulators (order * 2 + row tile) are tiles 0 to 5,
// the left operand goes through 6 and the right one through 7. While one block is multiplied the
// one before is converted, EACH rows after any product. Its sums of order 2 are stored only then,
// when they are sure to be complete.
template <int EACH, bool ADD_UP>
static void multiply_slice(const Left& given_left, const Right& given_right, int64_t slice,
                           const Results& given_results, unsigned char* sums) {
  const Left left = given_left;  // no store changes what these say
  const Right right = given_right;
  const Results results = given_results;
  const int64_t pairs = (left.tiles + 1) / 2;
  const int64_t depth_tile = slice * SLICE / FIXED_DEPTH;
  const int64_t depth_tiles = (left.depth.length(slice * SLICE) + FIXED_DEPTH - 1) / FIXED_DEPTH;
  Conversion before;
  int64_t buffer = 0, pair = 0, block = 0;
  while (pair < pairs) {
    const unsigned char* x =
        left.panels + 2 * pair * left.depth.bytes() + depth_tile * DIGITS_BYTES;
    const unsigned char* own = right.blocks + block * right.next + slice * SLICE_BYTES;
    const unsigned char* w = own + UNIT_BYTES;
    int32_t* to = reinterpret_cast<int32_t*>(sums + buffer);
    int row = 0;
    auto convert = [&]() __attribute__((always_inline)) {
      if (row + EACH > before.rows) return;
#pragma GCC unroll 4
      for (int i = 0; i < EACH; ++i) before.convert(row + i, ADD_UP);
      row += EACH;
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < depth_tiles; ++t, x += DIGITS_BYTES, w += DIGITS_BYTES) {
      const bool first = t == 0, last = t + 1 == depth_tiles;
      const unsigned char* below = x + left.depth.bytes();  // the second row tile
      // Each product shares an operand with the one before, and its sums with none of the last
      // three, whose results are not there yet.
      _tile_loadd(7, w + HIGH_DIGIT, 64);
      _tile_loadd(6, x + HIGH_DIGIT, 64);
      _tile_dpbssd(0, 6, 7);
      if (!first) convert();
      _tile_loadd(7, w + MIDDLE_DIGIT, 64);
      _tile_dpbssd(2, 6, 7);
      if (first) {
        if (before.rows) {
          int32_t* late = reinterpret_cast<int32_t*>(sums + (SUMS_BYTES - buffer));
          _tile_stored(4, late + 4 * 256, 64);
          _tile_stored(5, late + 5 * 256, 64);
        }
        _tile_zero(4);
        _tile_zero(5);
      } else {
        convert();
      }
      _tile_loadd(7, w + LOW_DIGIT, 64);
      _tile_dpbssd(4, 6, 7);
      convert();
      _tile_loadd(6, below + HIGH_DIGIT, 64);
      _tile_dpbssd(5, 6, 7);
      convert();
      _tile_loadd(7, w + MIDDLE_DIGIT, 64);
      _tile_dpbssd(3, 6, 7);
      convert();
      _tile_loadd(7, w + HIGH_DIGIT, 64);
      _tile_dpbssd(1, 6, 7);
      convert();
      if (last) _tile_stored(0, to, 64);
      _tile_loadd(6, x + LOW_DIGIT, 64);
      _tile_dpbssd(4, 6, 7);
      convert();
      _tile_loadd(6, below + LOW_DIGIT, 64);
      _tile_dpbssd(5, 6, 7);
      convert();
      _tile_loadd(6, below + MIDDLE_DIGIT, 64);
      _tile_dpbssd(3, 6, 7);
      convert();
      _tile_loadd(6, x + MIDDLE_DIGIT, 64);
      _tile_dpbssd(2, 6, 7);
      convert();
      if (last) _tile_stored(1, to + 256, 64);
      _tile_loadd(7, w + MIDDLE_DIGIT, 64);
      _tile_dpbssd(4, 6, 7);
      convert();
      _tile_loadd(6, below + MIDDLE_DIGIT, 64);
      _tile_dpbssd(5, 6, 7);
      convert();
    }
    _tile_stored(3, to + 3 * 256, 64);
    _tile_stored(2, to + 2 * 256, 64);
    for (; row < before.rows; ++row) before.convert(row, ADD_UP);
    const int64_t rest = left.rows - pair * 2 * TILE;
    before.sums = to;
    before.row_units = left.units + (slice * left.tiles + pair * 2) * TILE;
    before.to = left.to + pair * 2 * TILE;
    before.base = results.base + block * results.next;
    before.units = units(own);
    before.bias = results.bias ? load(results.bias + block * VL) : zero();
    before.rows = rest < 2 * TILE ? static_cast<int>(rest) : 2 * TILE;
    buffer = SUMS_BYTES - buffer;
    if (++block == right.count) block = 0, ++pair;
  }
  int32_t* late = reinterpret_cast<int32_t*>(sums + (SUMS_BYTES - buffer));
  _tile_stored(4, late + 4 * 256, 64);
  _tile_stored(5, late + 5 * 256, 64);
  for (int row = 0; row < before.rows; ++row) before.convert(row, ADD_UP);
}

// left times right. sums: scratch of 2 * SUMS_BYTES.
static void multiply(const Left& left, const Right& right, const Results& results,
                     unsigned char* sums) {
  const int64_t group = 32;  // blocks that stay in the second-level cache for all rows
  for (int64_t first = 0; first < right.count; first += group)
    for (int64_t slice = 0; slice < left.depth.slices; ++slice) {
      const bool two = left.depth.length(slice * SLICE) > FIXED_DEPTH;
      const bool add_up = slice > 0 || results.add_up;
      // Spread over the products of one or two depth tiles: while the matrix unit works the core
      // has one port left for vectors, and what does not fit there delays the unit.
      auto* f = two      ? add_up ? multiply_slice<2, true> : multiply_slice<2, false>
                : add_up ? multiply_slice<3, true>
                         : multiply_slice<3, false>;
      const int64_t count = right.count - first < group ? right.count - first : group;
      f(left, {right.blocks + first * right.next, right.next, count}, slice,
        {results.base + first * results.next, results.next,
         results.bias ? results.bias + first * VL : nullptr, add_up},
        sums);
    }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
