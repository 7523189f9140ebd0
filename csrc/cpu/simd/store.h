// Stores vectors of channels to a map, channels first or last.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// Writes `count` pixels of one channel block to out. from: one vector a pixel, `stride` floats
// apart; VL - 1 more pixels may be read.
template <class T>
CASVIT_INLINE void store_block(const Geometry& g, const Output& out, int64_t image, int64_t block,
                               int64_t pixel, int64_t count, const float* from, int64_t stride) {
  const int64_t channel = block * VL;
  const int channels = static_cast<int>(g.C - channel < VL ? g.C - channel : VL);
  T* to = static_cast<T*>(out.data) + image * g.C * g.pixels();
  if (out.channels_last) {
    for (int64_t i = 0; i < count; ++i)
      store_first(to + (pixel + i) * g.C + channel, load(from + i * stride), channels);
    return;
  }
  to += channel * g.pixels() + pixel;
  for (int64_t i = 0; i < count; i += VL) {
    const int n = static_cast<int>(count - i < VL ? count - i : VL);
    Vec r[VL];
    load_transposed(from + i * stride, stride, r);
    for (int j = 0; j < channels; ++j) store_first(to + j * g.pixels() + i, r[j], n);
  }
}

// Writes `count` pixels from `pixel` on, counted through all images. from: [count][row_floats]; VL
// - 1 more pixels may be read.
static inline void store_pixels(const Geometry& g, int64_t pixel, int64_t count, const float* from,
                                int64_t row_floats, const Output& out) {
  for (int64_t done = 0; done < count;) {  // what lies in one image at a time
    const int64_t image = (pixel + done) / g.pixels(), at = (pixel + done) % g.pixels();
    const int64_t n = g.pixels() - at < count - done ? g.pixels() - at : count - done;
    for (int64_t c = 0; c < g.blocks; ++c) {
      const float* own = from + done * row_floats + c * VL;
      switch (out.dtype) {
        case DType::F32: store_block<float>(g, out, image, c, at, n, own, row_floats); break;
        case DType::BF16: store_block<Bf16>(g, out, image, c, at, n, own, row_floats); break;
        case DType::F16: store_block<F16>(g, out, image, c, at, n, own, row_floats); break;
      }
    }
    done += n;
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
