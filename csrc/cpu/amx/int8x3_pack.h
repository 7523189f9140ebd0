// The operands of the float32 qkv product in fixed point (int8x3.h).
#pragma once

#include "cpu/amx/bf16x3.h"
#include "cpu/amx/int8x3.h"

namespace casvit {
namespace CASVIT_ISA {

// A block of weights.
static void pack_fixed_point(const float* matrix, int64_t C, const float* balance,
                             unsigned char* block) {
  auto channels = [&](int64_t c, Vec(&v)[TILE]) { columns(matrix + c, C, C - c, v); };
  pack_columns(FixedDepth(C), channels, balance, block);
}

// Channel c of the 16 pixels of a piece.
template <class T>
CASVIT_INLINE Vec pixels_of(const T* x, int64_t channel_stride, const Piece<TILE>& piece,
                            int64_t c) {
  const T* p = x + c * channel_stride;
  if (piece.consecutive) return load_as_float(p + piece.from[0]);
  if (piece.two_runs) {
    const __mmask16 all = first_lanes(piece.count), first = first_lanes(piece.run);
    return _mm512_or_ps(
        load_lanes_as_float(p + piece.from[0], first),
        load_lanes_as_float(p + piece.from[piece.count - 1] - (piece.count - 1), all & ~first));
  }
  alignas(64) float lanes[TILE];
  for (int i = 0; i < TILE; ++i) lanes[i] = widen_one(p + piece.from[i]);
  return load(lanes);
}
// Channels [begin, end) of them, balanced.
template <class T>
CASVIT_INLINE Range range_of(const T* x, int64_t channel_stride, const Piece<TILE>& piece,
                             const float* balance, int64_t begin, int64_t end) {
  if (channel_stride == 1) {
    Range own[TILE];
    for (int i = 0; i < TILE; ++i)
      for (int64_t c = begin; c < end; c += TILE)
        own[i].include(mul(load(balance + c),
                           load_first_as_float(x + piece.from[i] + c,
                                               end - c < TILE ? static_cast<int>(end - c) : TILE)));
    return across(own);
  }
  Range range;
  for (int64_t c = begin; c < end; ++c) {
    // Too many streams for the hardware prefetcher: one for each channel.
    if (piece.consecutive)
      _mm_prefetch(reinterpret_cast<const char*>(x + piece.from[0] + c * channel_stride + 4 * TILE),
                   _MM_HINT_T0);
    range.include(mul(splat(balance[c]), pixels_of(x, channel_stride, piece, c)));
  }
  return range;
}

// The pixels of a chunk as rows; false: some do not fit.
template <class T>
static bool pack_pixels(const Chunk& chunk, const T* x, const float* balance, const Left& left) {
  const int64_t C = chunk.g.C, stride = chunk.x.channel_stride;
  for (int64_t t = 0; t < chunk.tiles; ++t) {
    const Piece<TILE>& piece = chunk.pieces[t];
    std::memcpy(left.to + t * TILE, piece.to, sizeof piece.to);
    auto channels = [&](int64_t c, Vec(&v)[TILE])
                        __attribute__((always_inline)) { gather(x, stride, C, piece, c, v); };
    for (int64_t slice = 0; slice < left.depth.slices; ++slice) {
      const int64_t c = slice * SLICE;
      const int64_t length = left.depth.length(c);
      const Range range = range_of(x, stride, piece, balance, c, c + length);
      if (!range.fits(length)) return false;
      left.put(t, c, range, balance, channels);
    }
  }
  return true;
}
static bool pack_pixels(const Chunk& chunk, const float* balance, const Left& left) {
  switch (chunk.x.dtype) {
    case DType::F32:
      return pack_pixels(chunk, static_cast<const float*>(chunk.x.data), balance, left);
    case DType::BF16:
      return pack_pixels(chunk, static_cast<const Bf16*>(chunk.x.data), balance, left);
    case DType::F16:
      return pack_pixels(chunk, static_cast<const F16*>(chunk.x.data), balance, left);
  }
  return false;
}

}  // namespace CASVIT_ISA
}  // namespace casvit
