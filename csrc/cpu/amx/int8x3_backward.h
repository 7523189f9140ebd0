// The gradients of the float32 qkv product in fixed point (int8x3.h), and in bf16 parts
// (bf16x3_backward.h) where the numbers do not suit it.
#pragma once

#include "cpu/amx/bf16x3_backward.h"
#include "cpu/amx/int8x3.h"
#include "cpu/scratch.h"

namespace casvit {
namespace CASVIT_ISA {

// Of the weights: from column tile to column tile.
static int64_t column_bytes(int64_t C, Product kind) {
  return may_be_fixed(C, kind) ? block_bytes(FixedDepth(3 * C)) : column_bytes_in_parts(C, kind);
}
static int64_t input_gradient_weight_bytes(int64_t C, Product kind) {
  return (C + TILE - 1) / TILE * column_bytes(C, kind);
}
// One column tile of them.
static void input_gradient_pack_weights(const float* weight, int64_t C, Product kind,
                                        int64_t column, const float* balance, void* to) {
  unsigned char* own = static_cast<unsigned char*>(to) + column * column_bytes(C, kind);
  if (may_be_fixed(C, kind)) {
    const int64_t K = 3 * C, c = column * TILE;
    auto lines = [&](int64_t k, Vec(&v)[TILE]) {
      load_lines(weight + k * C + c, C, K - k, C - c, v);
    };
    pack_columns(FixedDepth(K), lines, balance, own);
  } else {
    pack_column_in_parts(weight, C, kind, column, own);
  }
}
// All of them in parts.
static const void* pack_in_parts(const float* weight, int64_t C) {
  static thread_local Buffer buffer;
  const int64_t each = column_bytes_in_parts(C, Product::F32), columns = (C + TILE - 1) / TILE;
  unsigned char* tiles = static_cast<unsigned char*>(buffer.get(columns * each));
  for (int64_t column = 0; column < columns; ++column)
    pack_column_in_parts(weight, C, Product::F32, column, tiles + column * each);
  return tiles;
}

// Rows of gradients at a time: they stay in the second-level cache.
static int64_t fixed_gradient_rows(const FixedDepth& depth) {
  const int64_t n = (1 << 20) / depth.bytes() / 2 * 2;
  return TILE * (n < 2 ? 2 : n > 16 ? 16 : n);
}
static int64_t input_gradient_temp_bytes(int64_t C, Product kind) {
  const int64_t parts = input_gradient_temp_bytes_in_parts(C, kind);
  const FixedDepth depth(3 * C);
  const int64_t rows = fixed_gradient_rows(depth), columns = (C + TILE - 1) / TILE;
  const int64_t fixed =
      2 * SUMS_BYTES + Left::bytes(depth, rows) + (rows + TILE) * columns * TILE * 4;
  return fixed > parts ? fixed : parts;
}

// Rows [.][numbers], dense; false: some do not fit.
static bool pack_rows(const float* from, int64_t numbers, int64_t row_floats, const float* balance,
                      const Left& left) {
  for (int64_t tile = 0; tile < left.tiles; ++tile) {
    const int64_t first = tile * TILE;
    for (int64_t row = first; row < first + TILE; ++row) left.to[row] = row * row_floats;
    auto some = [&](int64_t n, Vec(&v)[TILE]) __attribute__((always_inline)) {
      load_lines(from + first * numbers + n, numbers, left.rows - first, numbers - n, v);
    };
    for (int64_t slice = 0; slice < left.depth.slices; ++slice) {
      const int64_t n = slice * SLICE;
      const int64_t length = left.depth.length(n);
      Range own[TILE];
      for (int64_t m = n; m < n + length; m += TILE) {
        Vec v[TILE];
        some(m, v);
        const Vec factor = load(balance + m);
        for (int i = 0; i < TILE; ++i) own[i].include(mul(v[i], factor));
      }
      const Range range = across(own);
      if (!range.fits(length)) return false;
      left.put(tile, n, range, balance, some);
    }
  }
  return true;
}

// Pixels [begin, end) of all images of the gradient at x.
static void input_gradient(const Geometry& g, const float* grad, const void* weights,
                           const float* balance, const float* weight, Product kind, int64_t begin,
                           int64_t end, const Output& out, void* temp) {
  if (!may_be_fixed(g.C, kind))
    return input_gradient_in_parts(g, grad, weights, kind, begin, end, out, temp);
  const int64_t K = 3 * g.C, columns = (g.C + TILE - 1) / TILE, row_floats = columns * TILE;
  const Right right{static_cast<const unsigned char*>(weights), column_bytes(g.C, kind), columns};
  bool fixed = true;
  for (int64_t c = 0; fixed && c < columns; ++c)
    fixed = in_fixed_point(right.blocks + c * right.next);
  const void* parts = nullptr;
  const FixedDepth depth(K);
  const int64_t most = fixed_gradient_rows(depth);
  unsigned char* sums = static_cast<unsigned char*>(temp);
  unsigned char* panels = sums + 2 * SUMS_BYTES;
  float* rows = reinterpret_cast<float*>(panels + Left::bytes(depth, most));
  for (int64_t pixel = begin; pixel < end; pixel += most) {
    const int64_t count = end - pixel < most ? end - pixel : most;
    const Left left(depth, count, panels);
    if (fixed && pack_rows(grad + pixel * K, K, row_floats, balance, left)) {
      const TileConfig config;
      _tile_loadconfig(&config);
      multiply(left, right, {rows, TILE, nullptr, false}, sums);
      _tile_release();
      write_pixels(g, pixel, count, rows, row_floats, out);
    } else {
      if (!parts) parts = pack_in_parts(weight, g.C);
      input_gradient_in_parts(g, grad, parts, kind, pixel, pixel + count, out, temp);
    }
  }
}

// For the gradient of the weights: pixels at a time, while the left operand stays in the
// second-level cache.
static int64_t fixed_gradient_pixels(int64_t C) {
  const int64_t n = (5 << 18) / ((C + TILE - 1) / TILE * DIGITS_BYTES);
  return FIXED_DEPTH * (n < 1 ? 1 : n > 8 ? 8 : n);
}
constexpr int MOST_PIECES = 8 * FIXED_DEPTH / TILE + 1;

static int64_t weight_gradient_temp_bytes(int64_t C, int64_t columns, Product kind) {
  const int64_t parts = weight_gradient_temp_bytes_in_parts(C, columns, kind);
  const FixedDepth depth(fixed_gradient_pixels(C) + TILE);
  const int64_t rows = (C + TILE - 1) / TILE, whole = (columns + COLUMNS - 1) / COLUMNS * COLUMNS;
  const int64_t fixed = 2 * SUMS_BYTES + Left::bytes(depth, C) + COLUMNS * block_bytes(depth) +
                        rows * whole * TILE_BYTES;
  return fixed > parts ? fixed : parts;
}

// `count` pixels of x from `pixel` on, its channels as rows; false: some do not fit.
static bool pack_channels(const Geometry& g, const Input& x, int64_t pixel, int64_t count,
                          const Left& left) {
  const PixelRun run{&x, &g, 0, pixel, pixel + count};
  const int64_t pieces = (count + TILE - 1) / TILE;
  Piece<TILE> piece[MOST_PIECES];
  alignas(64) float scratch[(SLICE + TILE) * TILE];
  for (int64_t p = 0; p < pieces; ++p) piece[p].locate(run, pixel + p * TILE, 0);
  int64_t begin = 0;  // of a slice
  for (int64_t tile = 0; tile < left.tiles; ++tile) {
    auto some = [&](int64_t n, Vec(&v)[TILE]) __attribute__((always_inline)) {
      for (int i = 0; i < TILE; ++i)
        v[i] = n < count ? load(scratch + (n - begin + i) * TILE) : zero();
    };
    for (int64_t slice = 0; slice < left.depth.slices; ++slice) {
      begin = slice * SLICE;
      const int64_t length = left.depth.length(begin);
      Range own[TILE];
      for (int64_t m = 0; m < length; m += TILE) {
        Vec channels[TILE];
        load_channels(x, g.C, piece[(begin + m) / TILE], tile * TILE, channels);
        for (int i = 0; i < TILE; ++i) {
          own[i].include(channels[i]);
          store(scratch + (m + i) * TILE, channels[i]);
        }
      }
      const Range range = across(own);
      if (!range.fits(length)) return false;
      left.put(tile, begin, range, nullptr, some);
    }
  }
  return true;
}

static bool fixed_weight_gradient(const Geometry& g, const float* grad, const Input& x,
                                  int64_t begin, int64_t end, int64_t row_begin, int64_t row_end,
                                  float* to, void* temp) {
  const int64_t C = g.C, K = 3 * C, most = fixed_gradient_pixels(C);
  const FixedDepth longest(most + TILE);
  if (end - begin < TILE) return false;  // too few to tell what outshines what
  unsigned char* sums = static_cast<unsigned char*>(temp);
  unsigned char* panels = sums + 2 * SUMS_BYTES;
  unsigned char* blocks = panels + Left::bytes(longest, C);
  float* const totals = reinterpret_cast<float*>(blocks + COLUMNS * block_bytes(longest));
  const TileConfig config;
  for (int64_t pixel = begin, count; pixel < end; pixel += count) {
    count = end - pixel < most + TILE ? end - pixel : most;
    const FixedDepth depth(count);
    const Left left(depth, C, panels);
    if (!pack_channels(g, x, pixel, count, left)) return false;
    float* group = totals;
    for (int64_t row = row_begin; row < row_end; row += COLUMNS * TILE) {
      const int64_t left_over = (row_end - row + TILE - 1) / TILE;
      const int64_t columns = left_over < COLUMNS ? left_over : COLUMNS;
      const Right right{blocks, block_bytes(depth), columns};
      for (int64_t c = 0; c < columns; ++c) {
        const float* from = grad + pixel * K + row + c * TILE;
        auto pixels = [&](int64_t p, Vec(&v)[TILE]) {
          load_lines(from + p * K, K, count - p, K - row - c * TILE, v);
        };
        if (!pack_columns(depth, pixels, nullptr, blocks + c * right.next)) return false;
      }
      for (int64_t channel = 0; channel < left.tiles * TILE; ++channel)
        left.to[channel] = channel * columns * TILE;
      _tile_loadconfig(&config);
      multiply(left, right, {group, TILE, nullptr, pixel > begin}, sums);
      _tile_release();
      group += left.tiles * TILE * columns * TILE;
    }
  }
  write_weights(C, row_begin, row_end, totals, to);
  return true;
}
// Rows [row_begin, row_end) of the gradient of the weights, summed over pixels [begin, end) of all
// images; to: [3C][C].
static void weight_gradient(const Geometry& g, const float* grad, const Input& x, Product kind,
                            int64_t begin, int64_t end, int64_t row_begin, int64_t row_end,
                            float* to, void* temp) {
  if (!may_be_fixed(g.C, kind) ||
      !fixed_weight_gradient(g, grad, x, begin, end, row_begin, row_end, to, temp))
    weight_gradient_in_parts(g, grad, x, kind, begin, end, row_begin, row_end, to, temp);
}

}  // namespace CASVIT_ISA
}  // namespace casvit
