// The gradients of the qkv product on vectors (microkernel.h). G: [pixels][3C], the gradient at q,
// k and v; W: [3C][C].
//   of x: G W, one line for each pixel;
//   of the weights: X^T G, a sum over pixels with one line for each channel, written transposed.
#pragma once

#include "cpu/gemm/microkernel.h"
#include "cpu/simd/pixel_run.h"
#include "cpu/simd/store.h"

namespace casvit {
namespace CASVIT_ISA {

static int64_t gradient_terms(int64_t C, Product kind) {
  return with_terms(kind, [=](auto terms) { return terms_of<decltype(terms)>(3 * C); });
}

static int64_t input_gradient_weight_bytes(int64_t C, Product kind) {
  return (C + VL - 1) / VL * VL * gradient_terms(C, kind) * 4;
}

static void input_gradient_pack_weights(const float* weight, int64_t C, Product kind,
                                        int64_t column, const float*, void* to) {
  with_terms(kind, [=](auto terms) {
    using Terms = decltype(terms);
    pack_across<Terms, VL>([=](int64_t k) { return weight + k * C + column * VL; }, 3 * C,
                           C - column * VL,
                           static_cast<float*>(to) + column * VL * terms_of<Terms>(3 * C));
  });
}

// Pixels at a time: their panels stay in the second-level cache, and many of them share a pass over
// the weights.
static int64_t gradient_pixels(int64_t terms) {
  const int64_t n = 98304 / terms / PANEL * PANEL;
  return n < PANEL ? PANEL : n > 256 ? 256 : n;
}

static int64_t input_gradient_temp_bytes(int64_t C, Product kind) {
  const int64_t terms = gradient_terms(C, kind), pixels = gradient_pixels(terms);
  return (pixels * terms + (pixels + VL) * ((C + VL - 1) / VL * VL)) * 4;
}

template <class Terms>
static void input_gradient_of(const Geometry& g, const float* grad, const float* weights,
                              int64_t begin, int64_t end, const Output& out, float* panels) {
  const int64_t K = 3 * g.C, terms = terms_of<Terms>(K), most = gradient_pixels(terms);
  const int64_t row_floats = g.blocks * VL;
  float* rows = panels + most * terms;
  int64_t to[PANEL];
  for (int64_t i = 0; i < PANEL; ++i) to[i] = i * row_floats;
  for (int64_t pixel = begin; pixel < end; pixel += most) {
    const int64_t count = end - pixel < most ? end - pixel : most;
    for (int64_t p = 0; p < count; p += PANEL) {
      const int64_t last = count - p - 1;  // repeated where a panel has room for more
      const float* from = grad + (pixel + p) * K;
      pack_along<Terms, PANEL>([=](int64_t i) { return from + (i < last ? i : last) * K; }, K,
                               panels + p * terms);
    }
    const int64_t next = pixel + count, rest = end - next < most ? end - next : most;
    Ahead ahead(grad + next * K, rest * K * 4, 1, 0,
                (g.blocks + 2) / 3 * ((count + PANEL - 1) / PANEL));
    for (int64_t block = 0; block < g.blocks; block += 3)
      for (int64_t p = 0; p < count; p += PANEL) {
        ahead.some();
        multiply_panel<Terms>(panels + p * terms, terms, weights + block * VL * terms,
                              g.blocks - block < 3 ? g.blocks - block : 3, nullptr, false, to,
                              count - p < PANEL ? count - p : PANEL,
                              rows + p * row_floats + block * VL, VL);
      }
    write_pixels(g, pixel, count, rows, row_floats, out);
  }
}

// Pixels [begin, end) of all images of the gradient at x.
static void input_gradient(const Geometry& g, const float* grad, const void* weights, const float*,
                           const float*, Product kind, int64_t begin, int64_t end,
                           const Output& out, void* temp) {
  with_terms(kind, [&](auto terms) {
    input_gradient_of<decltype(terms)>(g, grad, static_cast<const float*>(weights), begin, end, out,
                                       static_cast<float*>(temp));
  });
}

// For the gradient of the weights: terms at a time. The panels of all channels stay in the
// second-level cache.
constexpr int64_t GRADIENT_TERMS = 192;

static int64_t weight_gradient_temp_bytes(int64_t C, int64_t tiles, Product) {
  const int64_t lines = (C + PANEL - 1) / PANEL * PANEL, row_floats = tiles * 16;
  return ((lines + 3 * VL) * GRADIENT_TERMS + lines * row_floats) * 4;
}

// All channels of the pixels of a piece: [channels / PANEL][terms][PANEL], of which `panels` is the
// piece's part.
template <class Terms, int P, class T>
CASVIT_INLINE void pack_channels(const T* x, int64_t channel_stride, int64_t C,
                                 const Piece<P>& piece, float* panels, int64_t next) {
  for (int64_t c = 0; c < C; c += PANEL, panels += next) {
    const T* own = x + c * channel_stride;
    const int64_t last = C - c - 1;  // repeated where a panel has room for more
    auto number = [&](int64_t i, int64_t k) {
      return own + (i < last ? i : last) * channel_stride + piece.from[k];
    };
    if (piece.run >= piece.count)
      pack_along<Terms, PANEL>([&](int64_t i) { return number(i, 0); }, piece.count, panels);
    else if (channel_stride == 1)
      pack_across<Terms, PANEL>([&](int64_t k) { return number(0, k); }, piece.count, last + 1,
                                panels);
    else pack_scattered<Terms, PANEL>(number, piece.count, last + 1, panels);
  }
}
template <class Terms, int P>
CASVIT_INLINE void pack_channels(const Input& x, int64_t C, const Piece<P>& piece, float* panels,
                                 int64_t next) {
  const int64_t stride = x.channel_stride;
  switch (x.dtype) {
    case DType::F32:
      return pack_channels<Terms>(static_cast<const float*>(x.data), stride, C, piece, panels,
                                  next);
    case DType::BF16:
      return pack_channels<Terms>(static_cast<const Bf16*>(x.data), stride, C, piece, panels, next);
    case DType::F16:
      return pack_channels<Terms>(static_cast<const F16*>(x.data), stride, C, piece, panels, next);
  }
}

template <class Terms>
static void weight_gradient_of(const Geometry& g, const float* grad, const Input& x, int64_t begin,
                               int64_t end, int64_t row_begin, int64_t row_end, float* to,
                               float* temp) {
  constexpr int P = VL * Terms::NUMBERS;
  const int64_t C = g.C, K = 3 * C, lines = (C + PANEL - 1) / PANEL * PANEL;
  const int64_t row_floats = (row_end - row_begin + VL - 1) / VL * VL;
  float* const weights = temp + lines * GRADIENT_TERMS;
  float* const sums = weights + 3 * VL * GRADIENT_TERMS;  // [C, padded][row_floats]
  int64_t places[PANEL];
  for (int64_t i = 0; i < PANEL; ++i) places[i] = i * row_floats;
  // Equal shares of the pixels, but for whole pieces.
  const int64_t most = GRADIENT_TERMS * Terms::NUMBERS, chunks = (end - begin + most - 1) / most;
  const int64_t share = ((end - begin + chunks - 1) / chunks + P - 1) / P * P;
  for (int64_t pixel = begin; pixel < end; pixel += share) {
    const int64_t count = end - pixel < share ? end - pixel : share;
    const int64_t terms = terms_of<Terms>(count);
    const PixelRun run{&x, &g, 0, pixel, pixel + count};
    for (int64_t p = 0; p < count; p += P) {
      Piece<P> piece;
      piece.locate(run, pixel + p, 0);
      pack_channels<Terms>(x, C, piece, temp + p / Terms::NUMBERS * PANEL, terms * PANEL);
    }
    const int64_t next = pixel + count, rest = end - next < share ? end - next : share;
    Ahead ahead(grad + next * K + row_begin, (row_end - row_begin) * 4, rest, K * 4,
                (row_end - row_begin + 3 * VL - 1) / (3 * VL) * (lines / PANEL));
    for (int64_t row = row_begin; row < row_end; row += 3 * VL) {
      const int64_t blocks = row_end - row > 2 * VL ? 3 : row_end - row > VL ? 2 : 1;
      for (int64_t b = 0; b < blocks; ++b)
        pack_across<Terms, VL>([=](int64_t k) { return grad + (pixel + k) * K + row + b * VL; },
                               count, row_end - row - b * VL, weights + b * VL * terms);
      for (int64_t c = 0; c < C; c += PANEL) {
        ahead.some();
        multiply_panel<Terms>(temp + c * terms, terms, weights, blocks, nullptr, pixel > begin,
                              places, PANEL, sums + c * row_floats + (row - row_begin), VL);
      }
    }
  }
  for (int64_t c = 0; c < C; c += VL)
    for (int64_t row = row_begin; row < row_end; row += VL) {
      Vec tile[VL];
      load_transposed(sums + c * row_floats + (row - row_begin), row_floats, tile);
      for (int64_t i = 0; i < VL && row + i < row_end; ++i)
        store_first(to + (row + i) * C + c, tile[i], static_cast<int>(C - c < VL ? C - c : VL));
    }
}

// Rows [row_begin, row_end) of the gradient of the weights, summed over pixels [begin, end) of all
// images; to: [3C][C].
static void weight_gradient(const Geometry& g, const float* grad, const Input& x, Product kind,
                            int64_t begin, int64_t end, int64_t row_begin, int64_t row_end,
                            float* to, void* temp) {
  with_terms(kind, [&](auto terms) {
    weight_gradient_of<decltype(terms)>(g, grad, x, begin, end, row_begin, row_end, to,
                                        static_cast<float*>(temp));
  });
}

}  // namespace CASVIT_ISA
}  // namespace casvit
