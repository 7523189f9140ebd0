// The gradients of the qkv GEMM on the matrix unit (AMX): bf16 in one pass; float32 in block fixed
// point (int8x3_backward.h) where the values fit it, else in split bf16 (bf16x3_backward.h).
#pragma once

#include "cpu/amx/bf16x3_backward.h"
#include "cpu/amx/int8x3_backward.h"
#include "cpu/scratch.h"

namespace casvit {
namespace CASVIT_ISA {

// Bytes of a column tile of the weights.
static int64_t column_bytes(int64_t C, Precision precision) {
  return may_use_int8(C, precision) ? block_bytes(Int8Depth(3 * C))
                                    : column_bytes_bf16x3(C, precision);
}
static int64_t input_gradient_weight_bytes(int64_t C, Precision precision) {
  return (C + TILE - 1) / TILE * column_bytes(C, precision);
}
// Packs one column tile.
static void input_gradient_pack_weights(const float* weight, int64_t C, Precision precision,
                                        int64_t column, const float* k_scale, void* to) {
  unsigned char* own = static_cast<unsigned char*>(to) + column * column_bytes(C, precision);
  if (may_use_int8(C, precision)) {
    const int64_t K = 3 * C, c = column * TILE;
    auto load_k = [&](int64_t k, Vec(&v)[TILE]) {
      load_tile(weight + k * C + c, C, K - k, C - c, v);
    };
    pack_columns(Int8Depth(K), load_k, k_scale, own);
  } else {
    pack_column_bf16x3(weight, C, precision, column, own);
  }
}
// Packs all of them in split bf16.
static const void* pack_weights_bf16x3(const float* weight, int64_t C) {
  static thread_local Buffer buffer;
  const int64_t each = column_bytes_bf16x3(C, Precision::F32), columns = (C + TILE - 1) / TILE;
  unsigned char* tiles = static_cast<unsigned char*>(buffer.get(columns * each));
  for (int64_t column = 0; column < columns; ++column)
    pack_column_bf16x3(weight, C, Precision::F32, column, tiles + column * each);
  return tiles;
}

static int64_t input_gradient_temp_bytes(int64_t C, Precision precision) {
  const int64_t parts = input_gradient_temp_bytes_bf16x3(C, precision);
  const Int8Depth depth(3 * C);
  const int64_t rows = int8_gradient_rows(depth), columns = (C + TILE - 1) / TILE;
  const int64_t int8 =
      2 * SUMS_BYTES + LeftOperand::bytes(depth, rows) + (rows + TILE) * columns * TILE * 4;
  return int8 > parts ? int8 : parts;
}

// Pixels [begin, end) of all images of the gradient at x.
static void input_gradient(const Geometry& g, const float* grad, const void* weights,
                           const float* k_scale, const float* weight, Precision precision,
                           int64_t begin, int64_t end, const Output& out, void* temp) {
  if (!may_use_int8(g.C, precision))
    return input_gradient_bf16x3(g, grad, weights, precision, begin, end, out, temp);
  const int64_t K = 3 * g.C, columns = (g.C + TILE - 1) / TILE, row_floats = columns * TILE;
  const RightOperand right{static_cast<const unsigned char*>(weights), column_bytes(g.C, precision),
                           columns};
  bool int8 = true;
  for (int64_t c = 0; int8 && c < columns; ++c) int8 = is_int8(right.blocks + c * right.next);
  const void* parts = nullptr;
  const Int8Depth depth(K);
  const int64_t most = int8_gradient_rows(depth);
  unsigned char* sums = static_cast<unsigned char*>(temp);
  unsigned char* panels = sums + 2 * SUMS_BYTES;
  float* rows = reinterpret_cast<float*>(panels + LeftOperand::bytes(depth, most));
  for (int64_t pixel = begin; pixel < end; pixel += most) {
    const int64_t count = end - pixel < most ? end - pixel : most;
    const LeftOperand left(depth, count, panels);
    if (int8 && pack_rows_int8(grad + pixel * K, K, row_floats, k_scale, left)) {
      const TileConfig config;
      _tile_loadconfig(&config);
      gemm_int8x3(left, right, {rows, TILE, nullptr, false}, sums);
      _tile_release();
      store_pixels(g, pixel, count, rows, row_floats, out);
    } else {
      if (!parts) parts = pack_weights_bf16x3(weight, g.C);
      input_gradient_bf16x3(g, grad, parts, precision, pixel, pixel + count, out, temp);
    }
  }
}

static int64_t weight_gradient_temp_bytes(int64_t C, int64_t columns, Precision precision) {
  const int64_t parts = weight_gradient_temp_bytes_bf16x3(C, columns, precision);
  const Int8Depth depth(int8_gradient_pixels(C) + TILE);
  const int64_t rows = (C + TILE - 1) / TILE, whole = (columns + COLUMNS - 1) / COLUMNS * COLUMNS;
  const int64_t int8 = 2 * SUMS_BYTES + LeftOperand::bytes(depth, C) +
                       COLUMNS * block_bytes(depth) + rows * whole * TILE_BYTES;
  return int8 > parts ? int8 : parts;
}

// Rows [row_begin, row_end) of the gradient of the weights, summed over pixels [begin, end) of all
// images; to: [3C][C].
static void weight_gradient(const Geometry& g, const float* grad, const Input& x,
                            Precision precision, int64_t begin, int64_t end, int64_t row_begin,
                            int64_t row_end, float* to, void* temp) {
  if (!may_use_int8(g.C, precision) ||
      !weight_gradient_int8(g, grad, x, begin, end, row_begin, row_end, to, temp))
    weight_gradient_bf16x3(g, grad, x, precision, begin, end, row_begin, row_end, to, temp);
}

constexpr QkvBackwardKernels QKV_BACKWARD = {
    input_gradient_weight_bytes, input_gradient_pack_weights,
    input_gradient_temp_bytes,   input_gradient,
    weight_gradient_temp_bytes,  weight_gradient};

}  // namespace CASVIT_ISA
}  // namespace casvit
