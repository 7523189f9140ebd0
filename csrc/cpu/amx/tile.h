// Tiles of the matrix unit (AMX), 16 rows of 64 bytes, and loads of 16 x 16 float blocks for them.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/pixel_run.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int TILE = 16;  // rows of a tile: pixels or outputs
constexpr int64_t TILE_BYTES = 1024;
constexpr int MAX_TILES = 32;  // pixel tiles of a chunk

struct Chunk {
  const Input& x;
  const Geometry& g;
  int64_t tiles;
  PixelGroup<TILE> pixel_groups[MAX_TILES];
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// to[i] lane j = from[j * stride + i]; zero for i >= count.
CASVIT_INLINE void load_columns(const float* from, int64_t stride, int64_t count, Vec (&to)[TILE]) {
  if (count >= TILE) return load_transposed(from, stride, to);
  const int n = count < 0 ? 0 : static_cast<int>(count);
  for (int j = 0; j < TILE; ++j) to[j] = n ? load_first_as_float(from + j * stride, n) : zero();
  transpose(to);
}

// Channels c to c + 15 of 16 pixels, as floats: to[i] are those of pixel i.
template <class T>
CASVIT_INLINE void gather_channels(const T* x, int64_t channel_stride, int64_t C,
                                   const PixelGroup<TILE>& pixel_group, int64_t c,
                                   Vec (&to)[TILE]) {
  const int count = C - c >= TILE ? TILE : C > c ? static_cast<int>(C - c) : 0;
  if (channel_stride == 1) {
    for (int i = 0; i < TILE; ++i) to[i] = load_first_as_float(x + pixel_group.from[i] + c, count);
  } else if (pixel_group.consecutive) {
    const T* p = x + pixel_group.from[0] + c * channel_stride;
    // One stream for each channel is too many for the hardware prefetcher.
    for (int i = 0; i < count; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(p + i * channel_stride + 4 * TILE), _MM_HINT_T0);
    load_transposed(p, channel_stride, count, to);
  } else if (pixel_group.two_runs) {
    const __mmask16 all = first_lanes(pixel_group.count), first = first_lanes(pixel_group.run);
    const T* p = x + pixel_group.from[0] + c * channel_stride;
    const T* q =
        x + pixel_group.from[pixel_group.count - 1] + c * channel_stride - (pixel_group.count - 1);
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
        pixel[j] = j < count ? widen_one(x + pixel_group.from[i] + (c + j) * channel_stride) : 0.0f;
      to[i] = load(pixel);
    }
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
