// The qkv product on vectors (microkernel.h). x is copied into panels whatever its layout and
// dtype, so both memory orders cost the same.
#pragma once

#include "cpu/gemm/microkernel.h"
#include "cpu/simd/pixel_run.h"

namespace casvit {
namespace CASVIT_ISA {

static int64_t terms_of(int64_t C, Product kind) {
  return with_terms(kind, [=](auto terms) { return terms_of<decltype(terms)>(C); });
}

static int64_t product_weight_bytes(int64_t C, int64_t blocks, Product kind) {
  return 3 * blocks * VL * terms_of(C, kind) * 4;
}

static void product_pack_weights(const float* matrix, int64_t C, int64_t blocks, Product kind,
                                 const float*, void* to) {
  with_terms(kind, [=](auto terms) {
    using Terms = decltype(terms);
    for (int64_t block = 0; block < 3 * blocks; ++block)
      pack_along<Terms, VL>([=](int i) { return matrix + (block * VL + i) * C; }, C,
                            static_cast<float*>(to) + block * VL * terms_of<Terms>(C));
  });
}

static int64_t pixels_per_chunk(int64_t terms) {
  int64_t n = 32768 / terms / PANEL * PANEL;  // panels of 128 KB
  return n < PANEL ? PANEL : n > 256 ? 256 : n;
}

static int64_t product_temp_bytes(int64_t C, Product kind, int64_t) {
  const int64_t terms = terms_of(C, kind);
  return pixels_per_chunk(terms) * terms * 4;
}

template <class Terms, class T>
CASVIT_INLINE void pack_pixels(const T* x, int64_t channel_stride, int64_t C,
                               const Piece<PANEL>& piece, float* panel) {
  if (piece.consecutive)
    pack_across<Terms, PANEL>([=](int64_t c) { return x + piece.from[0] + c * channel_stride; }, C,
                              PANEL, panel);
  else if (channel_stride == 1)
    pack_along<Terms, PANEL>([&](int i) { return x + piece.from[i]; }, C, panel);
  else
    pack_scattered<Terms, PANEL>(
        [&](int i, int64_t c) { return x + piece.from[i] + c * channel_stride; }, C, PANEL, panel);
}
template <class Terms>
CASVIT_INLINE void pack_pixels(const Input& x, int64_t C, const Piece<PANEL>& piece, float* panel) {
  const int64_t stride = x.channel_stride;
  switch (x.dtype) {
    case DType::F32:
      return pack_pixels<Terms>(static_cast<const float*>(x.data), stride, C, piece, panel);
    case DType::BF16:
      return pack_pixels<Terms>(static_cast<const Bf16*>(x.data), stride, C, piece, panel);
    case DType::F16:
      return pack_pixels<Terms>(static_cast<const F16*>(x.data), stride, C, piece, panel);
  }
}

template <class Terms>
static void product_of(const PixelRun& run, const WeightsView& w, int64_t block_begin,
                       int64_t block_end, float* planes, int64_t image_floats, float* panels) {
  const Geometry& g = *run.g;
  const int64_t terms = terms_of<Terms>(g.C), chunk = pixels_per_chunk(terms);
  const float* weights = reinterpret_cast<const float*>(w.product);
  Piece<PANEL> pieces[16];
  for (int64_t first = run.begin; first < run.end; first += chunk) {
    const int64_t pixels = run.end - first < chunk ? run.end - first : chunk;
    const int64_t count = (pixels + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < count; ++p) {
      pieces[p].locate(run, first + p * PANEL, image_floats);
      pack_pixels<Terms>(*run.x, g.C, pieces[p], panels + p * PANEL * terms);
    }
    for (int64_t block = block_begin; block < block_end; block += 3)
      for (int64_t p = 0; p < count; ++p)
        multiply_panel<Terms>(panels + p * PANEL * terms, terms, weights + block * VL * terms,
                              block_end - block < 3 ? block_end - block : 3,
                              w.qkv_bias + block * VL, false, pieces[p].to, pieces[p].count,
                              planes + block * g.plane, g.plane);
  }
}

static void product(const PixelRun& run, const WeightsView& w, Product kind, int64_t block_begin,
                    int64_t block_end, float* planes, int64_t image_floats, void* temp) {
  with_terms(kind, [&](auto terms) {
    product_of<decltype(terms)>(run, w, block_begin, block_end, planes, image_floats,
                                static_cast<float*>(temp));
  });
}

}  // namespace CASVIT_ISA
}  // namespace casvit
