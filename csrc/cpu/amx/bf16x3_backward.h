// bf16x3: the gradients of the qkv GEMM in split bf16. float32 takes six passes, bf16 (rounded
// operands, float32 sums) one. G: [pixels][3C], the gradient at q, k and v; W: [3C][C].
//   of x: G W, one row for each pixel;
//   of the weights: X^T G, K = pixels, written transposed. G^T X would have to transpose G, and x
//   with channels first, while packing.
#pragma once

#include "cpu/amx/bf16x3.h"
#include "cpu/simd/store.h"

namespace casvit {
namespace CASVIT_ISA {

// Bytes of a depth tile: high, middle, low; or bf16.
static int64_t parts_bytes(Precision precision) {
  return (precision == Precision::F32 ? 3 : 1) * TILE_BYTES;
}

// A 16 x 16 block; zeros past the last row or column.
CASVIT_INLINE void load_tile(const float* from, int64_t stride, int64_t rows, int64_t columns,
                             Vec (&to)[TILE]) {
  if (rows >= TILE && columns >= TILE) {
    for (int i = 0; i < TILE; ++i) to[i] = load(from + i * stride);
    return;
  }
  const int n = columns > TILE ? TILE : static_cast<int>(columns);
  for (int i = 0; i < TILE; ++i)
    to[i] = i < rows && n > 0 ? load_first_as_float(from + i * stride, n) : zero();
}
// Channels c to c + 15 of 16 pixels, a vector for each channel; zeros past the end.
template <class T>
CASVIT_INLINE void load_channels(const T* x, int64_t channel_stride, int64_t C,
                                 const PixelGroup<TILE>& pixel_group, int64_t c, Vec (&to)[TILE]) {
  if (pixel_group.consecutive) {
    const T* p = x + pixel_group.from[0] + c * channel_stride;
    for (int i = 0; i < TILE; ++i)
      to[i] = c + i < C ? load_as_float(p + i * channel_stride) : zero();
    return;
  }
  gather_channels(x, channel_stride, C, pixel_group, c, to);
  for (int i = pixel_group.count; i < TILE; ++i) to[i] = zero();
  transpose(to);
}
static void load_channels(const Input& x, int64_t C, const PixelGroup<TILE>& pixel_group, int64_t c,
                          Vec (&to)[TILE]) {
  const int64_t stride = x.channel_stride;
  switch (x.dtype) {
    case DType::F32:
      return load_channels(static_cast<const float*>(x.data), stride, C, pixel_group, c, to);
    case DType::BF16:
      return load_channels(static_cast<const Bf16*>(x.data), stride, C, pixel_group, c, to);
    case DType::F16:
      return load_channels(static_cast<const F16*>(x.data), stride, C, pixel_group, c, to);
  }
}

// sums [rows][row_floats] (+)= left * right: `row_tiles` by `column_tiles` tiles, each with `depth`
// depth tiles one behind the other.
template <int ROWS, int COLUMNS>
static void gemm_tiles(const unsigned char* x, const unsigned char* w, int64_t depth,
                       Precision precision, bool add_up, float* sums, int64_t row_floats) {
  const int64_t each = parts_bytes(precision);
  const Operands<ROWS, COLUMNS> o{depth * each, depth * each};
  const int64_t stride = row_floats * 4;
  float* below = sums + TILE * row_floats;
  if (add_up) {
    _tile_loadd(0, sums, stride);
    if (COLUMNS > 1) _tile_loadd(1, sums + TILE, stride);
    if (ROWS > 1) _tile_loadd(2, below, stride);
    if (ROWS > 1 && COLUMNS > 1) _tile_loadd(3, below + TILE, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  if (precision == Precision::F32) {
    o.load_x(x + LOW);
    o.load_w(w + HIGH);
    for (int64_t t = 0; t < depth; ++t) {
      o.first_five_passes(x, w, [] {});
      x += t + 1 < depth ? each : 0;  // the last load is not used
      w += t + 1 < depth ? each : 0;
      o.multiply_reload_both(x + LOW, w);
    }
  } else {
    o.load_x(x);
    o.load_w(w);
    for (int64_t t = 0; t < depth; ++t) {
      x += t + 1 < depth ? each : 0;
      w += t + 1 < depth ? each : 0;
      o.multiply_reload_both(x, w);
    }
  }
  _tile_stored(0, sums, stride);
  if (COLUMNS > 1) _tile_stored(1, sums + TILE, stride);
  if (ROWS > 1) _tile_stored(2, below, stride);
  if (ROWS > 1 && COLUMNS > 1) _tile_stored(3, below + TILE, stride);
}
static void gemm_tiles(const unsigned char* left, const unsigned char* right, int64_t row_tiles,
                       int64_t column_tiles, int64_t depth, Precision precision, bool add_up,
                       float* sums) {
  const int64_t row_floats = column_tiles * TILE, each = depth * parts_bytes(precision);
  for (int64_t c = 0; c < column_tiles; c += 2)
    for (int64_t r = 0; r < row_tiles; r += 2) {
      const bool rows = r + 1 < row_tiles, columns = c + 1 < column_tiles;
      auto* f = rows      ? columns ? gemm_tiles<2, 2> : gemm_tiles<2, 1>
                : columns ? gemm_tiles<1, 2>
                          : gemm_tiles<1, 1>;
      f(left + r * each, right + c * each, depth, precision, add_up,
        sums + r * TILE * row_floats + c * TILE, row_floats);
    }
}

// Pixel tiles at a time: their left operand stays in the L2 cache.
static int64_t gradient_rows(int64_t depth, Precision precision) {
  const int64_t n = (1 << 20) / (depth * parts_bytes(precision)) / 2 * 2;
  return n < 2 ? 2 : n > 16 ? 16 : n;
}

// Weights: [column tile][depth tile].
static int64_t column_bytes_bf16x3(int64_t C, Precision precision) {
  return (3 * C + BF16_TILE_K - 1) / BF16_TILE_K * parts_bytes(precision);
}
static void pack_column_bf16x3(const float* weight, int64_t C, Precision precision, int64_t column,
                               unsigned char* tiles) {
  const int64_t K = 3 * C, c = column * TILE;
  for (int64_t k = 0; k < K; k += BF16_TILE_K, tiles += parts_bytes(precision)) {
    Vec first[TILE], second[TILE];
    load_tile(weight + k * C + c, C, K - k, C - c, first);
    load_tile(weight + (k + TILE) * C + c, C, K - k - TILE, C - c, second);
    store_rounded(first, second, precision, tiles);
  }
}

static int64_t input_gradient_temp_bytes_bf16x3(int64_t C, Precision precision) {
  const int64_t depth = (3 * C + BF16_TILE_K - 1) / BF16_TILE_K, columns = (C + TILE - 1) / TILE;
  const int64_t rows = gradient_rows(depth, precision);
  return rows * depth * parts_bytes(precision) + (rows + 1) * columns * TILE_BYTES;
}

// Pixels [begin, end) of all images of the gradient at x.
static void input_gradient_bf16x3(const Geometry& g, const float* grad, const void* weights,
                                  Precision precision, int64_t begin, int64_t end,
                                  const Output& out, void* temp) {
  const int64_t K = 3 * g.C, depth = (K + BF16_TILE_K - 1) / BF16_TILE_K;
  const int64_t columns = (g.C + TILE - 1) / TILE, most = gradient_rows(depth, precision);
  unsigned char* left = static_cast<unsigned char*>(temp);
  float* sums = reinterpret_cast<float*>(left + most * depth * parts_bytes(precision));
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t pixel = begin; pixel < end; pixel += most * TILE) {
    const int64_t count = end - pixel < most * TILE ? end - pixel : most * TILE;
    const int64_t rows = (count + TILE - 1) / TILE;
    unsigned char* to = left;
    for (int64_t p = 0; p < count; p += TILE)
      for (int64_t k = 0; k < K; k += BF16_TILE_K, to += parts_bytes(precision)) {
        const float* from = grad + (pixel + p) * K + k;
        Vec first[TILE], second[TILE];
        load_tile(from, K, count - p, K - k, first);
        load_tile(from + TILE, K, count - p, K - k - TILE, second);
        store_truncated(first, second, precision, to);
      }
    gemm_tiles(left, static_cast<const unsigned char*>(weights), rows, columns, depth, precision,
               false, sums);
    store_pixels(g, pixel, count, sums, columns * TILE, out);
  }
  _tile_release();
}

// Depth tiles at a time of the gradient of the weights: their left operand stays in the L2 cache.
// COLUMNS: column tiles at a time.
static int64_t gradient_depth(int64_t rows, Precision precision) {
  const int64_t n = (5 << 18) / (rows * parts_bytes(precision));
  return n < 2 ? 2 : n > 16 ? 16 : n;
}
constexpr int64_t COLUMNS = 4;

static int64_t weight_gradient_temp_bytes_bf16x3(int64_t C, int64_t columns, Precision precision) {
  const int64_t rows = (C + TILE - 1) / TILE, whole = (columns + COLUMNS - 1) / COLUMNS * COLUMNS;
  return (rows + COLUMNS) * gradient_depth(rows, precision) * parts_bytes(precision) +
         rows * whole * TILE_BYTES;
}

// sums: [group of column tiles][C, padded][columns of the group], transposed to [3C][C].
static void store_weight_gradient(int64_t C, int64_t row_begin, int64_t row_end, const float* sums,
                                  float* to) {
  for (int64_t row = row_begin; row < row_end; row += COLUMNS * TILE) {
    const int64_t left_over = (row_end - row + TILE - 1) / TILE;
    const int64_t columns = left_over < COLUMNS ? left_over : COLUMNS;
    for (int64_t channel = 0; channel < C; channel += TILE, sums += columns * TILE * TILE)
      for (int64_t c = 0; c < columns; ++c) {
        Vec tile[TILE];
        load_transposed(sums + c * TILE, columns * TILE, tile);
        const int64_t first = row + c * TILE, n = C - channel < TILE ? C - channel : TILE;
        for (int64_t i = 0; i < TILE && first + i < row_end; ++i)
          store_first(to + (first + i) * C + channel, tile[i], static_cast<int>(n));
      }
  }
}

// Rows [row_begin, row_end) of the gradient of the weights, summed over pixels [begin, end) of all
// images; to: [3C][C].
static void weight_gradient_bf16x3(const Geometry& g, const float* grad, const Input& x,
                                   Precision precision, int64_t begin, int64_t end,
                                   int64_t row_begin, int64_t row_end, float* to, void* temp) {
  const int64_t C = g.C, K = 3 * C, rows = (C + TILE - 1) / TILE,
                depth = gradient_depth(rows, precision);
  unsigned char* left = static_cast<unsigned char*>(temp);
  unsigned char* right = left + rows * depth * parts_bytes(precision);
  float* const sums = reinterpret_cast<float*>(right + COLUMNS * depth * parts_bytes(precision));
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t pixel = begin; pixel < end; pixel += depth * BF16_TILE_K) {
    const int64_t count = end - pixel < depth * BF16_TILE_K ? end - pixel : depth * BF16_TILE_K;
    const int64_t tiles = (count + BF16_TILE_K - 1) / BF16_TILE_K;
    const PixelRun run{&x, &g, 0, pixel, end};
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t p = t * BF16_TILE_K;
      PixelGroup<TILE> pixel_groups[2];
      pixel_groups[0].locate(run, pixel + p, 0);
      if (count > p + TILE) pixel_groups[1].locate(run, pixel + p + TILE, 0);
      for (int64_t r = 0; r < rows; ++r) {
        Vec first[TILE], second[TILE];
        load_channels(x, C, pixel_groups[0], r * TILE, first);
        if (count > p + TILE) load_channels(x, C, pixel_groups[1], r * TILE, second);
        else
          for (int i = 0; i < TILE; ++i) second[i] = zero();
        store_rounded(first, second, precision, left + (r * tiles + t) * parts_bytes(precision));
      }
    }
    float* group_sums = sums;
    for (int64_t row = row_begin; row < row_end; row += COLUMNS * TILE) {
      const int64_t left_over = (row_end - row + TILE - 1) / TILE;
      const int64_t columns = left_over < COLUMNS ? left_over : COLUMNS;
      unsigned char* tile = right;
      for (int64_t c = row; c < row + columns * TILE; c += TILE)
        for (int64_t p = 0; p < count; p += BF16_TILE_K, tile += parts_bytes(precision)) {
          const float* from = grad + (pixel + p) * K + c;
          Vec first[TILE], second[TILE];
          load_tile(from, K, count - p, K - c, first);
          load_tile(from + TILE * K, K, count - p - TILE, K - c, second);
          store_truncated(first, second, precision, tile);
        }
      gemm_tiles(left, right, rows, columns, tiles, precision, pixel > begin, group_sums);
      group_sums += rows * columns * TILE * TILE;
    }
  }
  _tile_release();
  store_weight_gradient(C, row_begin, row_end, sums, to);
}

}  // namespace CASVIT_ISA
}  // namespace casvit
