// int8x3: the float32 GEMM of operands in block fixed point (int8x3_operands.h).
#pragma once

#include "cpu/amx/int8x3_operands.h"

namespace casvit {
namespace CASVIT_ISA {

// Where the result goes: row r of block b to base + to[r] + b * next.
struct Destination {
  float* base;
  int64_t next;
  const float* bias;  // [blocks][16], or null
  bool add_up;        // adds to what is there instead of the bias
};

// The epilogue of one block and up to 32 rows: int32 sums to float32, times the steps, to memory.
struct DequantizeEpilogue {
  const int32_t* sums = nullptr;  // [order][32][16]
  const float* row_steps = nullptr;
  const int64_t* to = nullptr;
  float* base = nullptr;
  Vec steps = zero(), bias = zero();
  int rows = 0;

  inline __attribute__((always_inline)) void convert(int row, bool add_up) const {
    const Vec sum =
        fma(fma(order(0, row), splat(256.0f), order(1, row)), splat(256.0f), order(2, row));
    float* p = base + to[row];
    // One step after the other: their product may overflow.
    store(p, fma(mul(sum, splat(row_steps[row])), steps, add_up ? load(p) : bias));
  }

 private:
  inline __attribute__((always_inline)) Vec order(int i, int row) const {
    return _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + i * 512 + row * VL));
  }
};

constexpr int64_t SUMS_BYTES =
    6 * TILE_BYTES + 256;  // a second buffer behind it is not a multiple of 4096 away

// One slice of all rows and blocks. Accumulators (order * 2 + row tile) are tiles 0 to 5; tile 6
// holds the left operand and tile 7 the right one. While a block is multiplied, the epilogue of the
// block before runs, EACH rows after every tile product. Its sums of order 2 are stored only then,
// so that the store does not wait for the last products.
template <int EACH, bool ADD_UP>
static void gemm_slice(const LeftOperand& given_left, const RightOperand& given_right,
                       int64_t slice, const Destination& given_results, unsigned char* sums) {
  const LeftOperand left = given_left;  // local copies: stores cannot alias them
  const RightOperand right = given_right;
  const Destination results = given_results;
  const int64_t pairs = (left.tiles + 1) / 2;
  const int64_t depth_tile = slice * SLICE_K / INT8_TILE_K;
  const int64_t depth_tiles = (left.depth.length(slice * SLICE_K) + INT8_TILE_K - 1) / INT8_TILE_K;
  DequantizeEpilogue previous;
  int64_t buffer = 0, pair = 0, block = 0;
  while (pair < pairs) {
    const unsigned char* x =
        left.panels + 2 * pair * left.depth.bytes() + depth_tile * DIGITS_BYTES;
    const unsigned char* own = right.blocks + block * right.next + slice * SLICE_BYTES;
    const unsigned char* w = own + STEP_BYTES;
    int32_t* to = reinterpret_cast<int32_t*>(sums + buffer);
    int row = 0;
    auto convert = [&]() __attribute__((always_inline)) {
      if (row + EACH > previous.rows) return;
#pragma GCC unroll 4
      for (int i = 0; i < EACH; ++i) previous.convert(row + i, ADD_UP);
      row += EACH;
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < depth_tiles; ++t, x += DIGITS_BYTES, w += DIGITS_BYTES) {
      const bool first = t == 0, last = t + 1 == depth_tiles;
      const unsigned char* below = x + left.depth.bytes();  // the second row tile
      // Each product shares one operand with the product before; no accumulator is used again
      // within three products, the latency of one.
      _tile_loadd(7, w + HIGH_DIGIT, 64);
      _tile_loadd(6, x + HIGH_DIGIT, 64);
      _tile_dpbssd(0, 6, 7);
      if (!first) convert();
      _tile_loadd(7, w + MIDDLE_DIGIT, 64);
      _tile_dpbssd(2, 6, 7);
      if (first) {
        if (previous.rows) {
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
    for (; row < previous.rows; ++row) previous.convert(row, ADD_UP);
    const int64_t rest = left.rows - pair * 2 * TILE;
    previous.sums = to;
    previous.row_steps = left.steps + (slice * left.tiles + pair * 2) * TILE;
    previous.to = left.to + pair * 2 * TILE;
    previous.base = results.base + block * results.next;
    previous.steps = steps(own);
    previous.bias = results.bias ? load(results.bias + block * VL) : zero();
    previous.rows = rest < 2 * TILE ? static_cast<int>(rest) : 2 * TILE;
    buffer = SUMS_BYTES - buffer;
    if (++block == right.count) block = 0, ++pair;
  }
  int32_t* late = reinterpret_cast<int32_t*>(sums + (SUMS_BYTES - buffer));
  _tile_stored(4, late + 4 * 256, 64);
  _tile_stored(5, late + 5 * 256, 64);
  for (int row = 0; row < previous.rows; ++row) previous.convert(row, ADD_UP);
}

// The GEMM of two packed operands. sums: scratch of 2 * SUMS_BYTES.
static void gemm_int8x3(const LeftOperand& left, const RightOperand& right,
                        const Destination& results, unsigned char* sums) {
  const int64_t group = 32;  // blocks that stay in the L2 cache for all rows
  for (int64_t first = 0; first < right.count; first += group)
    for (int64_t slice = 0; slice < left.depth.slices; ++slice) {
      const bool two = left.depth.length(slice * SLICE_K) > INT8_TILE_K;
      const bool add_up = slice > 0 || results.add_up;
      // EACH spreads the epilogue over the products of one or two depth tiles: while the matrix
      // unit works, one vector port is left, and what does not fit there delays the unit.
      auto* f = two      ? add_up ? gemm_slice<2, true> : gemm_slice<2, false>
                : add_up ? gemm_slice<3, true>
                         : gemm_slice<3, false>;
      const int64_t count = right.count - first < group ? right.count - first : group;
      f(left, {right.blocks + first * right.next, right.next, count}, slice,
        {results.base + first * results.next, results.next,
         results.bias ? results.bias + first * VL : nullptr, add_up},
        sums);
    }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
