// bf16x3 (split bf16): the operands of the qkv GEMM, and plain bf16 as its one-pass case.
//
// A float32 value is split into three bf16 parts of 8 bits each, high, middle and low, exactly. Of
// the nine partial products the six that reach float32 precision are accumulated in float32, small
// ones first.
#pragma once

#include "cpu/amx/tile.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int BF16_TILE_K = 32;  // K of a tile

// A depth tile, 32 of K, pairs channels i and i + 16, which takes no shuffle. For float32 it is
// three tiles, the high, middle and low parts. Where only 16 channels are left, their parts are
// paired with one another instead, which halves the passes:
//   of x: [high high] [middle middle] [low high]; of the weights: [high middle] [high low].
struct Bf16Depth {
  int64_t parts;  // 3 for float32, 1 for bf16
  int64_t tiles;  // depth tiles
  bool half;      // the last has 16 channels
  int64_t slice;  // depth tiles at a time: what fits the L1 cache
  Precision precision() const { return parts == 3 ? Precision::F32 : Precision::BF16; }
  int64_t bytes() const { return parts * tiles * TILE_BYTES; }
  int64_t length(int64_t begin) const { return begin + slice < tiles ? slice : tiles - begin; }
};
static Bf16Depth bf16_depth_of(int64_t C, Precision precision) {
  Bf16Depth d{};
  d.parts = precision == Precision::F32 ? 3 : 1;
  d.tiles = (C + BF16_TILE_K - 1) / BF16_TILE_K;
  d.half = d.parts == 3 && (C + TILE - 1) / TILE % 2 == 1;
  d.slice = d.parts == 3 ? 4 : 8;
  return d;
}

CASVIT_INLINE Vec upper_halves(Vec a) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), mask));
}
// Interleaves the bf16 parts of two vectors: lane i of `low` below, lane i of `high` above.
CASVIT_INLINE __m512i pairs(Vec low, Vec high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                 _mm512_castps_si512(high));
}

// A float as an exact sum of three floats of 8 significant bits each; the upper 16 bits are the
// bf16.
struct Split {
  Vec part[3];
};
// Weights are split by rounding, so that the partial products left out have no bias.
CASVIT_INLINE Split split_rounded(Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);  // round half to even
  Split s;
  s.part[0] = upper_halves(_mm512_castsi512_ps(_mm512_add_epi32(bits, even)));
  // The addition must not carry a NaN over into a finite value.
  const __m512i quiet =
      _mm512_or_si512(_mm512_castps_si512(upper_halves(a)), _mm512_set1_epi32(0x400000));
  s.part[0] = _mm512_mask_mov_ps(s.part[0], _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                                 _mm512_castsi512_ps(quiet));
  const Vec rest = sub(a, s.part[0]);
  const __m512i half = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
  s.part[1] = upper_halves(_mm512_castsi512_ps(half));
  s.part[2] = sub(rest, s.part[1]);
  return s;
}
// x is split by truncation, at half the cost. The lower 16 bits of the parts need not be zero:
// pairs() drops them.
CASVIT_INLINE Split split_truncated(Vec a) {
  Split s;
  s.part[0] = a;
  s.part[1] = sub(a, upper_halves(a));
  s.part[2] = sub(s.part[1], upper_halves(s.part[1]));
  return s;
}

CASVIT_INLINE void store_row(__m512i row, unsigned char* tile, int i) {
  _mm512_storeu_si512(tile + i * 64, row);
}
// Stores one depth tile of 16 rows. Left operand: row i, with first[i] and second[i] its K 0 to 15
// and 16 to 31. Right operand: first[i] and second[i] are K i and i + 16 of 16 columns. One operand
// is truncated, the other rounded: see split_rounded. bf16 is always rounded.
template <class SplitBy>
CASVIT_INLINE void store_parts(const Vec (&first)[TILE], const Vec (&second)[TILE],
                               Precision precision, const SplitBy& split, unsigned char* to) {
  if (precision == Precision::BF16) {
    for (int i = 0; i < TILE; ++i)
      store_row(pairs(split_rounded(first[i]).part[0], split_rounded(second[i]).part[0]), to, i);
    return;
  }
  for (int i = 0; i < TILE; ++i) {
    const Split a = split(first[i]), b = split(second[i]);
    for (int part = 0; part < 3; ++part)
      store_row(pairs(a.part[part], b.part[part]), to + part * TILE_BYTES, i);
  }
}
CASVIT_INLINE void store_truncated(const Vec (&first)[TILE], const Vec (&second)[TILE],
                                   Precision precision, unsigned char* to) {
  store_parts(first, second, precision, [](Vec a) { return split_truncated(a); }, to);
}
CASVIT_INLINE void store_rounded(const Vec (&first)[TILE], const Vec (&second)[TILE],
                                 Precision precision, unsigned char* to) {
  store_parts(first, second, precision, [](Vec a) { return split_rounded(a); }, to);
}
// Packs the weights of one block: [depth tile][16 channel pairs][16 outputs][2].
static void pack_weights_bf16(const float* matrix, int64_t C, const Bf16Depth& d,
                              unsigned char* block) {
  for (int64_t t = 0; t < d.tiles; ++t, block += d.parts * TILE_BYTES) {
    const float* row = matrix + t * BF16_TILE_K;
    Vec low[TILE], high[TILE];
    load_columns(row, C, C - t * BF16_TILE_K, low);
    if (d.half && t == d.tiles - 1) {
      for (int i = 0; i < TILE; ++i) {
        const Split a = split_rounded(low[i]);
        store_row(pairs(a.part[0], a.part[1]), block, i);
        store_row(pairs(a.part[0], a.part[2]), block + TILE_BYTES, i);
        store_row(_mm512_setzero_si512(), block + 2 * TILE_BYTES, i);
      }
      return;
    }
    load_columns(row + TILE, C, C - t * BF16_TILE_K - TILE, high);
    store_rounded(low, high, d.precision(), block);
  }
}

// Packs one pixel tile.
template <class T>
CASVIT_INLINE void pack_pixel_tile(const T* x, int64_t channel_stride, int64_t C,
                                   const PixelGroup<TILE>& pixel_group, const Bf16Depth& d,
                                   unsigned char* to) {
  for (int64_t t = 0; t < d.tiles; ++t, to += d.parts * TILE_BYTES) {
    Vec first[TILE], second[TILE];
    gather_channels(x, channel_stride, C, pixel_group, t * BF16_TILE_K, first);
    if (d.half && t == d.tiles - 1) {
      for (int i = 0; i < TILE; ++i) {
        const Split a = split_truncated(first[i]);
        store_row(pairs(a.part[0], a.part[0]), to, i);
        store_row(pairs(a.part[1], a.part[1]), to + TILE_BYTES, i);
        store_row(pairs(a.part[2], a.part[0]), to + 2 * TILE_BYTES, i);
      }
      return;
    }
    gather_channels(x, channel_stride, C, pixel_group, t * BF16_TILE_K + TILE, second);
    store_truncated(first, second, d.precision(), to);
  }
}
static void pack_pixel_tile(const Input& x, int64_t C, const PixelGroup<TILE>& pixel_group,
                            const Bf16Depth& d, unsigned char* tiles) {
  switch (x.dtype) {
    case DType::F32:
      return pack_pixel_tile(static_cast<const float*>(x.data), x.channel_stride, C, pixel_group, d,
                             tiles);
    case DType::BF16:
      return pack_pixel_tile(static_cast<const Bf16*>(x.data), x.channel_stride, C, pixel_group, d,
                             tiles);
    case DType::F16:
      return pack_pixel_tile(static_cast<const F16*>(x.data), x.channel_stride, C, pixel_group, d,
                             tiles);
  }
}

// Offsets of the parts in a depth tile.
constexpr int64_t HIGH = 0, MIDDLE = TILE_BYTES, LOW = 2 * TILE_BYTES;

}  // namespace CASVIT_ISA
}  // namespace casvit
