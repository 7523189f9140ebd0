// The gradients of the qkv GEMM over Vec. G: [pixels][3C], the gradient at q, k and v; W: [3C][C].
//   of x: G W, one row for each pixel;
//   of the weights: X^T G, K = pixels, one row for each channel, written transposed.
#pragma once

#include "cpu/gemm/microkernel.h"
#include "cpu/simd/pixel_run.h"
#include "cpu/simd/store.h"

namespace casvit {
namespace CASVIT_ISA {

static int64_t gradient_k_steps(int64_t C, Precision precision) {
  return with_mac(precision, [=](auto mac) { return k_steps_of<decltype(mac)>(3 * C); });
}

static int64_t input_gradient_weight_bytes(int64_t C, Precision precision) {
  return (C + VL - 1) / VL * VL * gradient_k_steps(C, precision) * 4;
}

static void input_gradient_pack_weights(const float* weight, int64_t C, Precision precision,
                                        int64_t column, const float*, void* to) {
  with_mac(precision, [=](auto mac) {
    using Mac = decltype(mac);
    pack_column_major<Mac, VL>([=](int64_t k) { return weight + k * C + column * VL; }, 3 * C,
                               C - column * VL,
                               static_cast<float*>(to) + column * VL * k_steps_of<Mac>(3 * C));
  });
}

// Pixels at a time: their panels stay in the L2 cache and share a pass over the weights.
static int64_t gradient_pixels(int64_t k_steps) {
  const int64_t n = 98304 / k_steps / PANEL_ROWS * PANEL_ROWS;
  return n < PANEL_ROWS ? PANEL_ROWS : n > 256 ? 256 : n;
}

static int64_t input_gradient_temp_bytes(int64_t C, Precision precision) {
  const int64_t k_steps = gradient_k_steps(C, precision), pixels = gradient_pixels(k_steps);
  return (pixels * k_steps + (pixels + VL) * ((C + VL - 1) / VL * VL)) * 4;
}

template <class Mac>
static void input_gradient_of(const Geometry& g, const float* grad, const float* weights,
                              int64_t begin, int64_t end, const Output& out, float* panels) {
  const int64_t K = 3 * g.C, k_steps = k_steps_of<Mac>(K), most = gradient_pixels(k_steps);
  const int64_t row_floats = g.blocks * VL;
  float* rows = panels + most * k_steps;
  int64_t to[PANEL_ROWS];
  for (int64_t i = 0; i < PANEL_ROWS; ++i) to[i] = i * row_floats;
  for (int64_t pixel = begin; pixel < end; pixel += most) {
    const int64_t count = end - pixel < most ? end - pixel : most;
    for (int64_t p = 0; p < count; p += PANEL_ROWS) {
      const int64_t last = count - p - 1;  // repeated where a panel has room for more
      const float* from = grad + (pixel + p) * K;
      pack_row_major<Mac, PANEL_ROWS>([=](int64_t i) { return from + (i < last ? i : last) * K; },
                                      K, panels + p * k_steps);
    }
    const int64_t next = pixel + count, rest = end - next < most ? end - next : most;
    Prefetcher next_grad(grad + next * K, rest * K * 4, 1, 0,
                         (g.blocks + 2) / 3 * ((count + PANEL_ROWS - 1) / PANEL_ROWS));
    for (int64_t block = 0; block < g.blocks; block += 3)
      for (int64_t p = 0; p < count; p += PANEL_ROWS) {
        next_grad.step();
        gemm_panel<Mac>(panels + p * k_steps, k_steps, weights + block * VL * k_steps,
                        g.blocks - block < 3 ? g.blocks - block : 3, nullptr, false, to,
                        count - p < PANEL_ROWS ? count - p : PANEL_ROWS,
                        rows + p * row_floats + block * VL, VL);
      }
    store_pixels(g, pixel, count, rows, row_floats, out);
  }
}

// Pixels [begin, end) of all images of the gradient at x.
static void input_gradient(const Geometry& g, const float* grad, const void* weights, const float*,
                           const float*, Precision precision, int64_t begin, int64_t end,
                           const Output& out, void* temp) {
  with_mac(precision, [&](auto mac) {
    input_gradient_of<decltype(mac)>(g, grad, static_cast<const float*>(weights), begin, end, out,
                                     static_cast<float*>(temp));
  });
}

// K steps at a time of the gradient of the weights: the panels of all channels stay in the L2
// cache.
constexpr int64_t GRADIENT_K_STEPS = 192;

static int64_t weight_gradient_temp_bytes(int64_t C, int64_t tiles, Precision) {
  const int64_t padded_rows = (C + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS,
                row_floats = tiles * 16;
  return ((padded_rows + 3 * VL) * GRADIENT_K_STEPS + padded_rows * row_floats) * 4;
}

// Packs all channels of a group of pixels into [channels / PANEL_ROWS][k_steps][PANEL_ROWS].
// `panels`: where the K steps of the group begin; next: floats from panel to panel.
template <class Mac, int P, class T>
CASVIT_INLINE void pack_channels(const T* x, int64_t channel_stride, int64_t C,
                                 const PixelGroup<P>& group, float* panels, int64_t next) {
  for (int64_t c = 0; c < C; c += PANEL_ROWS, panels += next) {
    const T* own = x + c * channel_stride;
    const int64_t last = C - c - 1;  // repeated where a panel has room for more
    auto value = [&](int64_t i, int64_t k) {
      return own + (i < last ? i : last) * channel_stride + group.from[k];
    };
    if (group.run >= group.count)
      pack_row_major<Mac, PANEL_ROWS>([&](int64_t i) { return value(i, 0); }, group.count, panels);
    else if (channel_stride == 1)
      pack_column_major<Mac, PANEL_ROWS>([&](int64_t k) { return value(0, k); }, group.count,
                                         last + 1, panels);
    else pack_strided<Mac, PANEL_ROWS>(value, group.count, last + 1, panels);
  }
}
template <class Mac, int P>
CASVIT_INLINE void pack_channels(const Input& x, int64_t C, const PixelGroup<P>& group,
                                 float* panels, int64_t next) {
  const int64_t stride = x.channel_stride;
  switch (x.dtype) {
    case DType::F32:
      return pack_channels<Mac>(static_cast<const float*>(x.data), stride, C, group, panels, next);
    case DType::BF16:
      return pack_channels<Mac>(static_cast<const Bf16*>(x.data), stride, C, group, panels, next);
    case DType::F16:
      return pack_channels<Mac>(static_cast<const F16*>(x.data), stride, C, group, panels, next);
  }
}

template <class Mac>
static void weight_gradient_of(const Geometry& g, const float* grad, const Input& x, int64_t begin,
                               int64_t end, int64_t row_begin, int64_t row_end, float* to,
                               float* temp) {
  constexpr int P = VL * Mac::K;
  const int64_t C = g.C, K = 3 * C, padded_rows = (C + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS;
  const int64_t row_floats = (row_end - row_begin + VL - 1) / VL * VL;
  float* const weights = temp + padded_rows * GRADIENT_K_STEPS;
  float* const sums = weights + 3 * VL * GRADIENT_K_STEPS;  // [C, padded][row_floats]
  int64_t places[PANEL_ROWS];
  for (int64_t i = 0; i < PANEL_ROWS; ++i) places[i] = i * row_floats;
  // Equal shares of the pixels, in whole groups.
  const int64_t most = GRADIENT_K_STEPS * Mac::K, chunks = (end - begin + most - 1) / most;
  const int64_t share = ((end - begin + chunks - 1) / chunks + P - 1) / P * P;
  for (int64_t pixel = begin; pixel < end; pixel += share) {
    const int64_t count = end - pixel < share ? end - pixel : share;
    const int64_t k_steps = k_steps_of<Mac>(count);
    const PixelRun run{&x, &g, 0, pixel, pixel + count};
    for (int64_t p = 0; p < count; p += P) {
      PixelGroup<P> group;
      group.locate(run, pixel + p, 0);
      pack_channels<Mac>(x, C, group, temp + p / Mac::K * PANEL_ROWS, k_steps * PANEL_ROWS);
    }
    const int64_t next = pixel + count, rest = end - next < share ? end - next : share;
    Prefetcher next_grad(
        grad + next * K + row_begin, (row_end - row_begin) * 4, rest, K * 4,
        (row_end - row_begin + 3 * VL - 1) / (3 * VL) * (padded_rows / PANEL_ROWS));
    for (int64_t row = row_begin; row < row_end; row += 3 * VL) {
      const int64_t blocks = row_end - row > 2 * VL ? 3 : row_end - row > VL ? 2 : 1;
      for (int64_t b = 0; b < blocks; ++b)
        pack_column_major<Mac, VL>([=](int64_t k) { return grad + (pixel + k) * K + row + b * VL; },
                                   count, row_end - row - b * VL, weights + b * VL * k_steps);
      for (int64_t c = 0; c < C; c += PANEL_ROWS) {
        next_grad.step();
        gemm_panel<Mac>(temp + c * k_steps, k_steps, weights, blocks, nullptr, pixel > begin,
                        places, PANEL_ROWS, sums + c * row_floats + (row - row_begin), VL);
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
static void weight_gradient(const Geometry& g, const float* grad, const Input& x,
                            Precision precision, int64_t begin, int64_t end, int64_t row_begin,
                            int64_t row_end, float* to, void* temp) {
  with_mac(precision, [&](auto mac) {
    weight_gradient_of<decltype(mac)>(g, grad, x, begin, end, row_begin, row_end, to,
                                      static_cast<float*>(temp));
  });
}

constexpr QkvBackwardKernels QKV_BACKWARD = {
    input_gradient_weight_bytes, input_gradient_pack_weights,
    input_gradient_temp_bytes,   input_gradient,
    weight_gradient_temp_bytes,  weight_gradient};

}  // namespace CASVIT_ISA
}  // namespace casvit
