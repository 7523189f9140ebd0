// The qkv GEMM on the matrix unit (AMX): bf16 in one pass; float32 in block fixed point (int8x3.h)
// where the values fit it, else in split bf16 (bf16x3.h).
#pragma once

#include "cpu/amx/bf16x3.h"
#include "cpu/amx/int8x3.h"
#include "cpu/amx/int8x3_pack.h"

namespace casvit {
namespace CASVIT_ISA {

// Bytes of a block of weights.
static int64_t weight_bytes(int64_t C, Precision precision) {
  return may_use_int8(C, precision) ? block_bytes(Int8Depth(C))
                                    : bf16_depth_of(C, precision).bytes();
}
static int64_t qkv_weight_bytes(int64_t C, int64_t blocks, Precision precision) {
  return 3 * blocks * weight_bytes(C, precision);
}
static void qkv_pack_weights(const float* matrix, int64_t C, int64_t blocks, Precision precision,
                             const float* k_scale, void* to) {
  const Bf16Depth depth = bf16_depth_of(C, precision);
  for (int64_t block = 0; block < 3 * blocks; ++block) {
    unsigned char* own = static_cast<unsigned char*>(to) + block * weight_bytes(C, precision);
    const float* rows = matrix + block * TILE * C;
    if (may_use_int8(C, precision)) pack_weights_int8(rows, C, k_scale, own);
    else pack_weights_bf16(rows, C, depth, own);
  }
}

static int64_t tiles_per_chunk(const Bf16Depth& d) {
  const int64_t n = (192 << 10) / d.bytes() / 2 * 2;
  return n < 14 ? 14 : n > MAX_TILES ? MAX_TILES : n;
}
static int64_t qkv_temp_bytes(int64_t C, Precision precision, int64_t) {
  const Bf16Depth d = bf16_depth_of(C, precision);
  const int64_t tiles = tiles_per_chunk(d), parts = Bf16x3Gemm::temp_bytes(d, tiles);
  if (!may_use_int8(C, precision)) return parts;
  const int64_t int8 = 2 * SUMS_BYTES + LeftOperand::bytes(Int8Depth(C), tiles * TILE);
  return 2 * d.bytes() + (int8 > parts ? int8 : parts);  // two blocks of weights in split bf16
}

static void qkv_gemm(const PixelRun& run, const WeightsView& w, Precision precision,
                     int64_t block_begin, int64_t block_end, float* planes, int64_t image_floats,
                     void* temp) {
  const Geometry& g = *run.g;
  const Bf16Depth depth = bf16_depth_of(g.C, precision);
  const int64_t next = weight_bytes(g.C, precision), chunk_pixels = tiles_per_chunk(depth) * TILE;
  const unsigned char* weights = w.qkv_weight + block_begin * next;
  bool int8 = may_use_int8(g.C, precision);
  for (int64_t block = block_begin; int8 && block < block_end; ++block)
    int8 = is_int8(w.qkv_weight + block * next);

  const TileConfig config;
  _tile_loadconfig(&config);
  Chunk chunk{*run.x, g, 0, {}};
  for (int64_t first = run.begin; first < run.end; first += chunk_pixels) {
    const int64_t end = first + chunk_pixels < run.end ? first + chunk_pixels : run.end;
    chunk.tiles = 0;
    for (int64_t p = first; p < end; p += TILE)
      chunk.pixel_groups[chunk.tiles++].locate(run, p, image_floats);
    if (int8) {
      unsigned char* sums = static_cast<unsigned char*>(temp);
      const LeftOperand left(Int8Depth(g.C), end - first, sums + 2 * SUMS_BYTES);
      if (pack_pixels_int8(chunk, w.k_scale, left)) {
        gemm_int8x3(left, {weights, next, block_end - block_begin},
                    {planes + block_begin * g.plane, g.plane, w.qkv_bias + block_begin * VL, false},
                    sums);
        continue;
      }
    }
    if (!may_use_int8(g.C, precision)) {
      Bf16x3Gemm(chunk, depth, w.qkv_bias, planes, temp)
          .multiply(weights, next, block_begin, block_end);
      continue;
    }
    unsigned char* parts = static_cast<unsigned char*>(temp);
    Bf16x3Gemm gemm(chunk, depth, w.qkv_bias, planes, parts + 2 * depth.bytes());
    for (int64_t block = block_begin; block < block_end; block += 2) {
      const int64_t stop = block + 2 < block_end ? block + 2 : block_end;
      for (int64_t i = block; i < stop; ++i)
        pack_weights_bf16(w.matrix + i * TILE * g.C, g.C, depth,
                          parts + (i - block) * depth.bytes());
      gemm.multiply(parts, depth.bytes(), block, stop);
    }
  }
  _tile_release();
}

constexpr QkvGemmKernels QKV_GEMM = {qkv_weight_bytes, qkv_pack_weights, qkv_temp_bytes, qkv_gemm,
                                     true};

}  // namespace CASVIT_ISA
}  // namespace casvit
