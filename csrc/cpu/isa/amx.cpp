// The qkv product on the matrix unit (AMX) of recent Xeons; gates and combination are AVX-512's.
// bf16 is one pass; float32 is fixed point where the numbers suit it (int8x3_pack.h), else six
// passes over bf16 parts (bf16x3.h).
#define CASVIT_ISA amx
#include "cpu/amx/bf16x3.h"
#include "cpu/amx/int8x3_backward.h"
#include "cpu/amx/int8x3_pack.h"
#include "cpu/gemm/own_gradients.h"
#include "cpu/kernels.h"
#include "cpu/simd/store.h"

namespace casvit {
namespace CASVIT_ISA {

// From block to block of the weights.
static int64_t weight_bytes(int64_t C, Product kind) {
  return may_be_fixed(C, kind) ? block_bytes(FixedDepth(C)) : depth_of(C, kind).bytes();
}
static int64_t product_weight_bytes(int64_t C, int64_t blocks, Product kind) {
  return 3 * blocks * weight_bytes(C, kind);
}
static void product_pack_weights(const float* matrix, int64_t C, int64_t blocks, Product kind,
                                 const float* balance, void* to) {
  const Depth depth = depth_of(C, kind);
  for (int64_t block = 0; block < 3 * blocks; ++block) {
    unsigned char* own = static_cast<unsigned char*>(to) + block * weight_bytes(C, kind);
    const float* rows = matrix + block * TILE * C;
    if (may_be_fixed(C, kind)) pack_fixed_point(rows, C, balance, own);
    else pack_parts(rows, C, depth, own);
  }
}

static int64_t tiles_per_chunk(const Depth& d) {
  const int64_t n = (192 << 10) / d.bytes() / 2 * 2;
  return n < 14 ? 14 : n > MOST_TILES ? MOST_TILES : n;
}
static int64_t product_temp_bytes(int64_t C, Product kind, int64_t) {
  const Depth d = depth_of(C, kind);
  const int64_t tiles = tiles_per_chunk(d), parts = PartsProduct::temp_bytes(d, tiles);
  if (!may_be_fixed(C, kind)) return parts;
  const int64_t fixed = 2 * SUMS_BYTES + Left::bytes(FixedDepth(C), tiles * TILE);
  return 2 * d.bytes() + (fixed > parts ? fixed : parts);  // two blocks in parts
}

static void product(const PixelRun& run, const WeightsView& w, Product kind, int64_t block_begin,
                    int64_t block_end, float* planes, int64_t image_floats, void* temp) {
  const Geometry& g = *run.g;
  const Depth depth = depth_of(g.C, kind);
  const int64_t next = weight_bytes(g.C, kind), chunk_pixels = tiles_per_chunk(depth) * TILE;
  const unsigned char* weights = w.product + block_begin * next;
  bool fixed = may_be_fixed(g.C, kind);
  for (int64_t block = block_begin; fixed && block < block_end; ++block)
    fixed = in_fixed_point(w.product + block * next);

  const TileConfig config;
  _tile_loadconfig(&config);
  Chunk chunk{*run.x, g, 0, {}};
  for (int64_t first = run.begin; first < run.end; first += chunk_pixels) {
    const int64_t end = first + chunk_pixels < run.end ? first + chunk_pixels : run.end;
    chunk.tiles = 0;
    for (int64_t p = first; p < end; p += TILE)
      chunk.pieces[chunk.tiles++].locate(run, p, image_floats);
    if (fixed) {
      unsigned char* sums = static_cast<unsigned char*>(temp);
      const Left left(FixedDepth(g.C), end - first, sums + 2 * SUMS_BYTES);
      if (pack_pixels(chunk, w.balance, left)) {
        multiply(left, {weights, next, block_end - block_begin},
                 {planes + block_begin * g.plane, g.plane, w.qkv_bias + block_begin * VL, false},
                 sums);
        continue;
      }
    }
    if (!may_be_fixed(g.C, kind)) {
      PartsProduct(chunk, depth, w.qkv_bias, planes, temp)
          .multiply(weights, next, block_begin, block_end);
      continue;
    }
    unsigned char* parts = static_cast<unsigned char*>(temp);
    PartsProduct product(chunk, depth, w.qkv_bias, planes, parts + 2 * depth.bytes());
    for (int64_t block = block_begin; block < block_end; block += 2) {
      const int64_t stop = block + 2 < block_end ? block + 2 : block_end;
      for (int64_t i = block; i < stop; ++i)
        pack_parts(w.matrix + i * TILE * g.C, g.C, depth, parts + (i - block) * depth.bytes());
      product.multiply(parts, depth.bytes(), block, stop);
    }
  }
  _tile_release();
}

}  // namespace CASVIT_ISA
}  // namespace casvit

namespace casvit {

const Kernels& amx_kernels() {
  using namespace amx;
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "amx";
    k.balanced = true;
    k.product_weight_bytes = product_weight_bytes;
    k.product_pack_weights = product_pack_weights;
    k.product_temp_bytes = product_temp_bytes;
    k.product = product;
    return with_own_gradients(k);
  }();
  return kernels;
}

}  // namespace casvit
