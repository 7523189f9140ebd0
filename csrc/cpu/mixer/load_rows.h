// Rows of a map in any layout and dtype as halo-padded rows of a channel block.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixer/depthwise.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// The first n of VL elements; memory behind them is not read.
template <class T>
CASVIT_INLINE Vec load_first(const T* p, int n) {
  T lanes[VL] = {};
  std::memcpy(lanes, p, sizeof(T) * static_cast<size_t>(n));
  return load_as_float(lanes);
}

// Rows [y_begin, y_end) of a channel block of x, with a zero halo; zero outside the image. x: the
// block's first channel of the image.
template <class T>
CASVIT_INLINE void read_rows(const T* x, const Input& in, const Geometry& g, int channels,
                             int64_t y_begin, int64_t y_end, float* to) {
  const int64_t first = y_begin < 0 ? 0 : y_begin, last = y_end > g.H ? g.H : y_end;
  for (int64_t y = y_begin; y < y_end; ++y) {
    float* row = to + (y - y_begin) * g.row;
    if (y < first || y >= last) {
      clear_row(g, row);
    } else {
      store(row, zero());
      store(row + (g.W + 1) * VL, zero());
    }
  }
  to += (first - y_begin) * g.row + VL;
  const int64_t pixels = (last - first) * g.W;
  if (in.column_stride == 1 && in.row_stride == g.W && pixels >= VL) {
    const T* from = x + first * g.W;
    int64_t column = 0;
    float* row = to;
    for (int64_t i = 0; i < pixels; i += VL) {
      if (i + VL > pixels) {  // the last vector overlaps the one before
        i = pixels - VL;
        row = to + i / g.W * g.row;
        column = i % g.W;
      }
      Vec r[VL];
      for (int j = 0; j < VL; ++j)
        r[j] = j < channels ? load_as_float(from + j * in.channel_stride + i) : zero();
      transpose(r);
      for (int j = 0; j < VL; ++j) {
        store(row + column * VL, r[j]);
        if (++column == g.W) {
          column = 0;
          row += g.row;
        }
      }
    }
    return;
  }
  for (int64_t y = first; y < last; ++y, to += g.row) {
    const T* from = x + y * in.row_stride;
    if (in.channel_stride == 1 && channels == VL) {
      for (int64_t i = 0; i < g.W; ++i)
        store(to + i * VL, load_as_float(from + i * in.column_stride));
    } else if (in.channel_stride == 1) {
      for (int64_t i = 0; i < g.W; ++i)
        store(to + i * VL, load_first(from + i * in.column_stride, channels));
    } else {
      for (int64_t i = 0; i < g.W; ++i)
        for (int j = 0; j < VL; ++j)
          to[i * VL + j] =
              j < channels ? widen_one(from + i * in.column_stride + j * in.channel_stride) : 0.0f;
    }
  }
}
static void read_rows(const Input& in, const Geometry& g, int64_t image, int64_t block,
                      int64_t y_begin, int64_t y_end, float* to) {
  const int64_t channel = block * VL;
  const int channels = static_cast<int>(g.C - channel < VL ? g.C - channel : VL);
  const int64_t offset = image * in.batch_stride + channel * in.channel_stride;
  switch (in.dtype) {
    case DType::F32:
      return read_rows(static_cast<const float*>(in.data) + offset, in, g, channels, y_begin, y_end,
                       to);
    case DType::BF16:
      return read_rows(static_cast<const Bf16*>(in.data) + offset, in, g, channels, y_begin, y_end,
                       to);
    case DType::F16:
      return read_rows(static_cast<const F16*>(in.data) + offset, in, g, channels, y_begin, y_end,
                       to);
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
