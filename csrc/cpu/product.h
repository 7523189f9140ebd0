// The qkv product in float32, written once over Vec. Weights: [block][C][lanes]; x is copied into
// panels [C][16 pixels], whatever its layout and dtype, so both memory orders cost the same.
#pragma once

#include "mixer.h"
#include "pixels.h"
#include "vec.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int PANEL = 16;                         // pixels
constexpr int PIXELS_AT_ONCE = VL == 16 ? 8 : 4;  // times 3 blocks: what the registers hold

static int64_t product_weight_bytes(int64_t C, int64_t blocks, Product) {
  return 3 * blocks * VL * C * 4;
}

static void product_pack_weights(const float* matrix, int64_t C, int64_t blocks, Product,
                                 const float*, void* to) {
  float* out = static_cast<float*>(to);
  for (int64_t block = 0; block < 3 * blocks; ++block)
    for (int64_t c = 0; c < C; ++c)
      for (int i = 0; i < VL; ++i) *out++ = matrix[(block * VL + i) * C + c];
}

static int64_t pixels_per_chunk(int64_t C) {
  int64_t n = 32768 / C / PANEL * PANEL;  // panels of 128 KB
  return n < PANEL ? PANEL : n > 256 ? 256 : n;
}

static int64_t product_temp_bytes(int64_t C, Product, int64_t) {
  return pixels_per_chunk(C) * C * 4;
}

template <class T>
CASVIT_INLINE void pack_panel(const T* x, int64_t channel_stride, int64_t C,
                              const Piece<PANEL>& piece, float* panel) {
  int64_t c = 0;
  if (piece.consecutive) {
    const T* p = x + piece.from[0];
    for (; c < C; ++c)
      for (int j = 0; j < PANEL; j += VL)
        store(panel + c * PANEL + j, load_as_float(p + c * channel_stride + j));
  } else if (channel_stride == 1) {
    for (; c + VL <= C; c += VL)
      for (int j = 0; j < PANEL; j += VL) {
        Vec r[VL];
        for (int i = 0; i < VL; ++i) r[i] = load_as_float(x + piece.from[j + i] + c);
        transpose(r);
        for (int i = 0; i < VL; ++i) store(panel + (c + i) * PANEL + j, r[i]);
      }
  }
  for (; c < C; ++c)
    for (int i = 0; i < PANEL; ++i)
      panel[c * PANEL + i] = widen_one(x + piece.from[i] + c * channel_stride);
}

static void pack_panel(const Input& x, int64_t C, const Piece<PANEL>& piece, float* panel) {
  switch (x.dtype) {
    case DType::F32:
      return pack_panel(static_cast<const float*>(x.data), x.channel_stride, C, piece, panel);
    case DType::BF16:
      return pack_panel(static_cast<const Bf16*>(x.data), x.channel_stride, C, piece, panel);
    case DType::F16:
      return pack_panel(static_cast<const F16*>(x.data), x.channel_stride, C, piece, panel);
  }
}

template <int BLOCKS>
CASVIT_INLINE void multiply(const float* panel, int64_t C, const float* weights, const float* bias,
                            const int64_t* to, int count, float* const (&planes)[3]) {
  constexpr int N = PIXELS_AT_ONCE;
  // Sums of at most 128 terms are added up in scratch: one long chain would lose a digit.
  for (int64_t begin = 0; begin < C; begin += 128) {
    const int64_t end = begin + 128 < C ? begin + 128 : C;
    Vec acc[N][BLOCKS];
    for (int b = 0; b < BLOCKS; ++b)
      for (int i = 0; i < N; ++i) acc[i][b] = begin ? zero() : load(bias + b * VL);
    for (int64_t c = begin; c < end; ++c) {
      Vec w[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) w[b] = load(weights + (b * C + c) * VL);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const Vec pixel = splat(panel[c * PANEL + i]);
#pragma GCC unroll 3
        for (int b = 0; b < BLOCKS; ++b) acc[i][b] = fma(pixel, w[b], acc[i][b]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if (i >= count) break;
      for (int b = 0; b < BLOCKS; ++b) {
        float* sum = planes[b] + to[i];
        store(sum, begin ? add(load(sum), acc[i][b]) : acc[i][b]);
      }
    }
  }
}

static void product(const PixelRun& run, const WeightsView& w, Product, int64_t block_begin,
                    int64_t block_end, float* planes, int64_t image_floats, void* temp) {
  const Geometry& g = *run.g;
  const int64_t C = g.C, chunk = pixels_per_chunk(C);
  const float* weights = reinterpret_cast<const float*>(w.product);
  float* panels = static_cast<float*>(temp);
  Piece<PANEL> pieces[16];
  for (int64_t first = run.begin; first < run.end; first += chunk) {
    const int64_t pixels = run.end - first < chunk ? run.end - first : chunk;
    const int64_t count = (pixels + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < count; ++p) {
      pieces[p].locate(run, first + p * PANEL, image_floats);
      pack_panel(*run.x, C, pieces[p], panels + p * PANEL * C);
    }
    for (int64_t block = block_begin; block < block_end; block += 3) {
      const int64_t blocks = block_end - block < 3 ? block_end - block : 3;
      float* to[3];
      for (int64_t b = 0; b < 3; ++b) to[b] = planes + (block + (b < blocks ? b : 0)) * g.plane;
      const float* bias = w.qkv_bias + block * VL;
      const float* from = weights + block * VL * C;
      for (int64_t p = 0; p < count; ++p)
        for (int i = 0; i < pieces[p].count; i += PIXELS_AT_ONCE) {
          const float* panel = panels + p * PANEL * C + i;
          const int64_t* offsets = pieces[p].to + i;
          const int n = pieces[p].count - i;
          if (blocks == 3) multiply<3>(panel, C, from, bias, offsets, n, to);
          else if (blocks == 2) multiply<2>(panel, C, from, bias, offsets, n, to);
          else multiply<1>(panel, C, from, bias, offsets, n, to);
        }
    }
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
