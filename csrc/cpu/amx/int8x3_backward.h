// int8x3: the gradients of the float32 qkv GEMM. G: [pixels][3C].
#pragma once

#include "cpu/amx/bf16x3_backward.h"
#include "cpu/amx/int8x3.h"

namespace casvit {
namespace CASVIT_ISA {

// Rows of G at a time: their panels stay in the L2 cache.
static int64_t int8_gradient_rows(const Int8Depth& depth) {
  const int64_t n = (1 << 20) / depth.bytes() / 2 * 2;
  return TILE * (n < 2 ? 2 : n > 16 ? 16 : n);
}

// Packs dense rows of k values; false if some do not fit.
static bool pack_rows_int8(const float* from, int64_t k, int64_t row_floats, const float* k_scale,
                           const LeftOperand& left) {
  for (int64_t tile = 0; tile < left.tiles; ++tile) {
    const int64_t first = tile * TILE;
    for (int64_t row = first; row < first + TILE; ++row) left.to[row] = row * row_floats;
    auto load_k = [&](int64_t n, Vec(&v)[TILE]) __attribute__((always_inline)) {
      load_tile(from + first * k + n, k, left.rows - first, k - n, v);
    };
    for (int64_t slice = 0; slice < left.depth.slices; ++slice) {
      const int64_t n = slice * SLICE_K;
      const int64_t length = left.depth.length(n);
      Range own[TILE];
      for (int64_t m = n; m < n + length; m += TILE) {
        Vec v[TILE];
        load_k(m, v);
        const Vec factor = load(k_scale + m);
        for (int i = 0; i < TILE; ++i) own[i].include(mul(v[i], factor));
      }
      const Range range = reduce_lanes(own);
      if (!range.fits(length)) return false;
      left.pack_slice(tile, n, range, k_scale, load_k);
    }
  }
  return true;
}

// Pixels at a time of the gradient of the weights: the left operand stays in the L2 cache.
static int64_t int8_gradient_pixels(int64_t C) {
  const int64_t n = (5 << 18) / ((C + TILE - 1) / TILE * DIGITS_BYTES);
  return INT8_TILE_K * (n < 1 ? 1 : n > 8 ? 8 : n);
}
constexpr int MAX_PIXEL_GROUPS = 8 * INT8_TILE_K / TILE + 1;

// Packs the channels of x as rows, with K = `count` pixels from `pixel` on; false if some do not
// fit.
static bool pack_channels_int8(const Geometry& g, const Input& x, int64_t pixel, int64_t count,
                               const LeftOperand& left) {
  const PixelRun run{&x, &g, 0, pixel, pixel + count};
  const int64_t pixel_groups = (count + TILE - 1) / TILE;
  PixelGroup<TILE> pixel_group[MAX_PIXEL_GROUPS];
  alignas(64) float scratch[(SLICE_K + TILE) * TILE];
  for (int64_t p = 0; p < pixel_groups; ++p) pixel_group[p].locate(run, pixel + p * TILE, 0);
  int64_t begin = 0;  // of the slice
  for (int64_t tile = 0; tile < left.tiles; ++tile) {
    auto load_k = [&](int64_t n, Vec(&v)[TILE]) __attribute__((always_inline)) {
      for (int i = 0; i < TILE; ++i)
        v[i] = n < count ? load(scratch + (n - begin + i) * TILE) : zero();
    };
    for (int64_t slice = 0; slice < left.depth.slices; ++slice) {
      begin = slice * SLICE_K;
      const int64_t length = left.depth.length(begin);
      Range own[TILE];
      for (int64_t m = 0; m < length; m += TILE) {
        Vec channels[TILE];
        load_channels(x, g.C, pixel_group[(begin + m) / TILE], tile * TILE, channels);
        for (int i = 0; i < TILE; ++i) {
          own[i].include(channels[i]);
          store(scratch + (m + i) * TILE, channels[i]);
        }
      }
      const Range range = reduce_lanes(own);
      if (!range.fits(length)) return false;
      left.pack_slice(tile, begin, range, nullptr, load_k);
    }
  }
  return true;
}

static bool weight_gradient_int8(const Geometry& g, const float* grad, const Input& x,
                                 int64_t begin, int64_t end, int64_t row_begin, int64_t row_end,
                                 float* to, void* temp) {
  const int64_t C = g.C, K = 3 * C, most = int8_gradient_pixels(C);
  const Int8Depth longest(most + TILE);
  if (end - begin < TILE) return false;  // too few to judge outliers
  unsigned char* sums = static_cast<unsigned char*>(temp);
  unsigned char* panels = sums + 2 * SUMS_BYTES;
  unsigned char* blocks = panels + LeftOperand::bytes(longest, C);
  float* const totals = reinterpret_cast<float*>(blocks + COLUMNS * block_bytes(longest));
  const TileConfig config;
  for (int64_t pixel = begin, count; pixel < end; pixel += count) {
    count = end - pixel < most + TILE ? end - pixel : most;
    const Int8Depth depth(count);
    const LeftOperand left(depth, C, panels);
    if (!pack_channels_int8(g, x, pixel, count, left)) return false;
    float* group = totals;
    for (int64_t row = row_begin; row < row_end; row += COLUMNS * TILE) {
      const int64_t left_over = (row_end - row + TILE - 1) / TILE;
      const int64_t columns = left_over < COLUMNS ? left_over : COLUMNS;
      const RightOperand right{blocks, block_bytes(depth), columns};
      for (int64_t c = 0; c < columns; ++c) {
        const float* from = grad + pixel * K + row + c * TILE;
        auto pixels = [&](int64_t p, Vec(&v)[TILE]) {
          load_tile(from + p * K, K, count - p, K - row - c * TILE, v);
        };
        if (!pack_columns(depth, pixels, nullptr, blocks + c * right.next)) return false;
      }
      for (int64_t channel = 0; channel < left.tiles * TILE; ++channel)
        left.to[channel] = channel * columns * TILE;
      _tile_loadconfig(&config);
      gemm_int8x3(left, right, {group, TILE, nullptr, pixel > begin}, sums);
      _tile_release();
      group += left.tiles * TILE * columns * TILE;
    }
  }
  store_weight_gradient(C, row_begin, row_end, totals, to);
  return true;
}

}  // namespace CASVIT_ISA
}  // namespace casvit
