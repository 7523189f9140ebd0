// The qkv GEMM over Vec. x is packed into panels whatever its layout and dtype, so both memory
// orders cost the same.
#pragma once

#include "cpu/gemm/microkernel.h"
#include "cpu/simd/pixel_run.h"

namespace casvit {
namespace CASVIT_ISA {

static int64_t k_steps_of(int64_t C, Precision precision) {
  return with_mac(precision, [=](auto mac) { return k_steps_of<decltype(mac)>(C); });
}

static int64_t qkv_weight_bytes(int64_t C, int64_t blocks, Precision precision) {
  return 3 * blocks * VL * k_steps_of(C, precision) * 4;
}

static void qkv_pack_weights(const float* matrix, int64_t C, int64_t blocks, Precision precision,
                             const float*, void* to) {
  with_mac(precision, [=](auto mac) {
    using Mac = decltype(mac);
    for (int64_t block = 0; block < 3 * blocks; ++block)
      pack_row_major<Mac, VL>([=](int i) { return matrix + (block * VL + i) * C; }, C,
                              static_cast<float*>(to) + block * VL * k_steps_of<Mac>(C));
  });
}

static int64_t pixels_per_chunk(int64_t k_steps) {
  int64_t n = 32768 / k_steps / PANEL_ROWS * PANEL_ROWS;  // panels of 128 KB
  return n < PANEL_ROWS ? PANEL_ROWS : n > 256 ? 256 : n;
}

static int64_t qkv_temp_bytes(int64_t C, Precision precision, int64_t) {
  const int64_t k_steps = k_steps_of(C, precision);
  return pixels_per_chunk(k_steps) * k_steps * 4;
}

template <class Mac, class T>
CASVIT_INLINE void pack_pixels(const T* x, int64_t channel_stride, int64_t C,
                               const PixelGroup<PANEL_ROWS>& group, float* panel) {
  if (group.consecutive)
    pack_column_major<Mac, PANEL_ROWS>(
        [=](int64_t c) { return x + group.from[0] + c * channel_stride; }, C, PANEL_ROWS, panel);
  else if (channel_stride == 1)
    pack_row_major<Mac, PANEL_ROWS>([&](int i) { return x + group.from[i]; }, C, panel);
  else
    pack_strided<Mac, PANEL_ROWS>(
        [&](int i, int64_t c) { return x + group.from[i] + c * channel_stride; }, C, PANEL_ROWS,
        panel);
}
template <class Mac>
CASVIT_INLINE void pack_pixels(const Input& x, int64_t C, const PixelGroup<PANEL_ROWS>& group,
                               float* panel) {
  const int64_t stride = x.channel_stride;
  switch (x.dtype) {
    case DType::F32:
      return pack_pixels<Mac>(static_cast<const float*>(x.data), stride, C, group, panel);
    case DType::BF16:
      return pack_pixels<Mac>(static_cast<const Bf16*>(x.data), stride, C, group, panel);
    case DType::F16:
      return pack_pixels<Mac>(static_cast<const F16*>(x.data), stride, C, group, panel);
  }
}

template <class Mac>
static void qkv_gemm_of(const PixelRun& run, const WeightsView& w, int64_t block_begin,
                        int64_t block_end, float* planes, int64_t image_floats, float* panels) {
  const Geometry& g = *run.g;
  const int64_t k_steps = k_steps_of<Mac>(g.C), chunk = pixels_per_chunk(k_steps);
  const float* weights = reinterpret_cast<const float*>(w.qkv_weight);
  PixelGroup<PANEL_ROWS> groups[16];
  for (int64_t first = run.begin; first < run.end; first += chunk) {
    const int64_t pixels = run.end - first < chunk ? run.end - first : chunk;
    const int64_t count = (pixels + PANEL_ROWS - 1) / PANEL_ROWS;
    for (int64_t p = 0; p < count; ++p) {
      groups[p].locate(run, first + p * PANEL_ROWS, image_floats);
      pack_pixels<Mac>(*run.x, g.C, groups[p], panels + p * PANEL_ROWS * k_steps);
    }
    for (int64_t block = block_begin; block < block_end; block += 3)
      for (int64_t p = 0; p < count; ++p)
        gemm_panel<Mac>(panels + p * PANEL_ROWS * k_steps, k_steps, weights + block * VL * k_steps,
                        block_end - block < 3 ? block_end - block : 3, w.qkv_bias + block * VL,
                        false, groups[p].to, groups[p].count, planes + block * g.plane, g.plane);
  }
}

static void qkv_gemm(const PixelRun& run, const WeightsView& w, Precision precision,
                     int64_t block_begin, int64_t block_end, float* planes, int64_t image_floats,
                     void* temp) {
  with_mac(precision, [&](auto mac) {
    qkv_gemm_of<decltype(mac)>(run, w, block_begin, block_end, planes, image_floats,
                               static_cast<float*>(temp));
  });
}

constexpr QkvGemmKernels QKV_GEMM = {qkv_weight_bytes, qkv_pack_weights, qkv_temp_bytes, qkv_gemm,
                                     false};

}  // namespace CASVIT_ISA
}  // namespace casvit
