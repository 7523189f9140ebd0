// int8x3: the operands of the qkv GEMM.
#pragma once

#include "cpu/amx/bf16x3_pack.h"
#include "cpu/amx/int8x3_operands.h"

namespace casvit {
namespace CASVIT_ISA {

// One block of weights.
static void pack_weights_int8(const float* matrix, int64_t C, const float* k_scale,
                              unsigned char* block) {
  auto channels = [&](int64_t c, Vec(&v)[TILE]) { load_columns(matrix + c, C, C - c, v); };
  pack_columns(Int8Depth(C), channels, k_scale, block);
}

// Channel c of the 16 pixels of a pixel_group.
template <class T>
CASVIT_INLINE Vec load_pixels(const T* x, int64_t channel_stride,
                              const PixelGroup<TILE>& pixel_group, int64_t c) {
  const T* p = x + c * channel_stride;
  if (pixel_group.consecutive) return load_as_float(p + pixel_group.from[0]);
  if (pixel_group.two_runs) {
    const __mmask16 all = first_lanes(pixel_group.count), first = first_lanes(pixel_group.run);
    return _mm512_or_ps(
        load_lanes_as_float(p + pixel_group.from[0], first),
        load_lanes_as_float(p + pixel_group.from[pixel_group.count - 1] - (pixel_group.count - 1),
                            all & ~first));
  }
  alignas(64) float lanes[TILE];
  for (int i = 0; i < TILE; ++i) lanes[i] = widen_one(p + pixel_group.from[i]);
  return load(lanes);
}
// The range of channels [begin, end) of 16 pixels, times k_scale.
template <class T>
CASVIT_INLINE Range range_of(const T* x, int64_t channel_stride,
                             const PixelGroup<TILE>& pixel_group, const float* k_scale,
                             int64_t begin, int64_t end) {
  if (channel_stride == 1) {
    Range own[TILE];
    for (int i = 0; i < TILE; ++i)
      for (int64_t c = begin; c < end; c += TILE)
        own[i].include(mul(load(k_scale + c),
                           load_first_as_float(x + pixel_group.from[i] + c,
                                               end - c < TILE ? static_cast<int>(end - c) : TILE)));
    return reduce_lanes(own);
  }
  Range range;
  for (int64_t c = begin; c < end; ++c) {
    // One stream for each channel is too many for the hardware prefetcher.
    if (pixel_group.consecutive)
      _mm_prefetch(
          reinterpret_cast<const char*>(x + pixel_group.from[0] + c * channel_stride + 4 * TILE),
          _MM_HINT_T0);
    range.include(mul(splat(k_scale[c]), load_pixels(x, channel_stride, pixel_group, c)));
  }
  return range;
}

// Packs the pixels of a chunk as rows; false if some do not fit.
template <class T>
static bool pack_pixels_int8(const Chunk& chunk, const T* x, const float* k_scale,
                             const LeftOperand& left) {
  const int64_t C = chunk.g.C, stride = chunk.x.channel_stride;
  for (int64_t t = 0; t < chunk.tiles; ++t) {
    const PixelGroup<TILE>& pixel_group = chunk.pixel_groups[t];
    std::memcpy(left.to + t * TILE, pixel_group.to, sizeof pixel_group.to);
    auto channels = [&](int64_t c, Vec(&v)[TILE]) __attribute__((always_inline)) {
      gather_channels(x, stride, C, pixel_group, c, v);
    };
    for (int64_t slice = 0; slice < left.depth.slices; ++slice) {
      const int64_t c = slice * SLICE_K;
      const int64_t length = left.depth.length(c);
      const Range range = range_of(x, stride, pixel_group, k_scale, c, c + length);
      if (!range.fits(length)) return false;
      left.pack_slice(t, c, range, k_scale, channels);
    }
  }
  return true;
}
static bool pack_pixels_int8(const Chunk& chunk, const float* k_scale, const LeftOperand& left) {
  switch (chunk.x.dtype) {
    case DType::F32:
      return pack_pixels_int8(chunk, static_cast<const float*>(chunk.x.data), k_scale, left);
    case DType::BF16:
      return pack_pixels_int8(chunk, static_cast<const Bf16*>(chunk.x.data), k_scale, left);
    case DType::F16:
      return pack_pixels_int8(chunk, static_cast<const F16*>(chunk.x.data), k_scale, left);
  }
  return false;
}

}  // namespace CASVIT_ISA
}  // namespace casvit
