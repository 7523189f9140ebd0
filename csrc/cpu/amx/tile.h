// Tiles of the matrix unit (AMX): 16 lines of 64 bytes.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/pixel_run.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int TILE = 16;  // lines of a tile: pixels or outputs
constexpr int64_t TILE_BYTES = 1024;
constexpr int MOST_TILES = 32;  // pixel tiles worked on at a time

struct Chunk {
  const Input& x;
  const Geometry& g;
  int64_t tiles;
  Piece<TILE> pieces[MOST_TILES];
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// to[i] lane j = from[j * stride + i]; zero for i >= count.
CASVIT_INLINE void columns(const float* from, int64_t stride, int64_t count, Vec (&to)[TILE]) {
  if (count >= TILE) return load_transposed(from, stride, to);
  const int n = count < 0 ? 0 : static_cast<int>(count);
  for (int j = 0; j < TILE; ++j) to[j] = n ? load_first_as_float(from + j * stride, n) : zero();
  transpose(to);
}

// 16 channels from c on of 16 pixels, as floats: to[i] are those of pixel i.
template <class T>
CASVIT_INLINE void gather(const T* x, int64_t channel_stride, int64_t C, const Piece<TILE>& piece,
                          int64_t c, Vec (&to)[TILE]) {
  const int count = C - c >= TILE ? TILE : C > c ? static_cast<int>(C - c) : 0;
  if (channel_stride == 1) {
    for (int i = 0; i < TILE; ++i) to[i] = load_first_as_float(x + piece.from[i] + c, count);
  } else if (piece.consecutive) {
    const T* p = x + piece.from[0] + c * channel_stride;
    // Too many streams for the hardware prefetcher: one for each channel.
    for (int i = 0; i < count; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(p + i * channel_stride + 4 * TILE), _MM_HINT_T0);
    load_transposed(p, channel_stride, count, to);
  } else if (piece.two_runs) {
    const __mmask16 all = first_lanes(piece.count), first = first_lanes(piece.run);
    const T* p = x + piece.from[0] + c * channel_stride;
    const T* q = x + piece.from[piece.count - 1] + c * channel_stride - (piece.count - 1);
    for (int i = 0; i < TILE; ++i) {
      to[i] = zero();
      if (i < count)
        to[i] = _mm512_or_ps(load_lanes_as_float(p + i * channel_stride, first),
                             load_lanes_as_float(q + i * channel_stride, all & ~first));
    }
    transpose(to);
  } else {
    alignas(64) float pixel[TILE];
    for (int i = 0; i < TILE; ++i) {
      for (int j = 0; j < TILE; ++j)
        pixel[j] = j < count ? widen_one(x + piece.from[i] + (c + j) * channel_stride) : 0.0f;
      to[i] = load(pixel);
    }
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
