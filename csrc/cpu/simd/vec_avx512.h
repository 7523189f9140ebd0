// Vec on AVX-512: 16 lanes.
#pragma once

#include <immintrin.h>

#include "cpu/simd/types.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int VL = 16;
using Vec = __m512;

CASVIT_INLINE Vec zero() { return _mm512_setzero_ps(); }
CASVIT_INLINE Vec splat(float a) { return _mm512_set1_ps(a); }
CASVIT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
// Keeps a vector in a register: the compiler may not fold its load into every use.
CASVIT_INLINE Vec in_register(Vec a) {
  asm("" : "+v"(a));
  return a;
}
CASVIT_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
CASVIT_INLINE void store_first(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), a);
}
CASVIT_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
CASVIT_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
CASVIT_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
CASVIT_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
CASVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Both return b where b is NaN.
CASVIT_INLINE Vec max_keep_nan(Vec a, Vec b) { return _mm512_max_ps(a, b); }
CASVIT_INLINE Vec min_keep_nan(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// a where condition > 0 or NaN, else 0.
CASVIT_INLINE Vec where_positive(Vec condition, Vec a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, zero(), _CMP_NLE_UQ), a);
}
CASVIT_INLINE Vec round_even(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n for integral n in [-120, 128]; overflows to infinity.
CASVIT_INLINE Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

CASVIT_INLINE Vec load_as_float(const float* p) { return load(p); }
CASVIT_INLINE Vec load_as_float(const Bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
CASVIT_INLINE Vec load_as_float(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Masked load: zeros in the other lanes, whose memory is not read.
CASVIT_INLINE Vec load_lanes_as_float(const float* p, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, p);
}
CASVIT_INLINE Vec load_lanes_as_float(const Bf16* p, __mmask16 lanes) {
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
CASVIT_INLINE Vec load_lanes_as_float(const F16* p, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}
CASVIT_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
template <class T>
CASVIT_INLINE Vec load_first_as_float(const T* p, int n) {
  return load_lanes_as_float(p, first_lanes(n));
}
CASVIT_INLINE __m256i to_bf16(Vec a) {
  __m512i bits = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
CASVIT_INLINE void store_first(Bf16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), to_bf16(a));
}
CASVIT_INLINE void store_first(F16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u),
                           _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

CASVIT_INLINE Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
// An entry of a table of 16 for each lane; the index is in the lowest bits of m.
using Index = __m512i;
CASVIT_INLINE Index index16(Vec m) { return _mm512_castps_si512(m); }
CASVIT_INLINE Vec lookup16(const float* table, Index i) {
  return _mm512_permutexvar_ps(i, _mm512_load_ps(table));
}

// r[i] lane j <-> r[j] lane i
CASVIT_INLINE void transpose(Vec (&r)[VL]) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// r[j] lane i = from[i * stride + j]. 128-bit quarters of rows are gathered first: an insertion
// from memory takes no shuffle, and the core issues only one shuffle a cycle.
CASVIT_INLINE void load_transposed(const float* from, int64_t stride, Vec (&r)[VL]) {
  for (int j = 0; j < 16; j += 4) {
    __m512 q[4];
    for (int i = 0; i < 4; ++i) {
      const float* p = from + i * stride + j;
      q[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
      q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(p + 4 * stride), 1);
      q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(p + 8 * stride), 2);
      q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(p + 12 * stride), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(q[0], q[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(q[0], q[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(q[2], q[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(q[2], q[3]));
    r[j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[j + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[j + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
}

// Lane i of the result is the sum over the lanes of the vector at p + i * VL.
CASVIT_INLINE Vec horizontal_sums(const float* p) {
  __m512 t[8], u[4];
  for (int i = 0; i < 8; ++i) {
    __m512 a = load(p + 2 * i * VL), b = load(p + (2 * i + 1) * VL);
    t[i] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  __m512 v = add(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  __m512 w = add(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return add(_mm512_shuffle_f32x4(v, w, 0x88), _mm512_shuffle_f32x4(v, w, 0xdd));
}

}  // namespace CASVIT_ISA
}  // namespace casvit
