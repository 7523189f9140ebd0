// Vec on AVX2 with FMA and F16C: 8 lanes.
#pragma once

#include <immintrin.h>

#include "cpu/simd/types.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int VL = 8;
using Vec = __m256;

CASVIT_INLINE Vec zero() { return _mm256_setzero_ps(); }
CASVIT_INLINE Vec splat(float a) { return _mm256_set1_ps(a); }
CASVIT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
CASVIT_INLINE Vec in_register(Vec a) {
  asm("" : "+x"(a));
  return a;
}
CASVIT_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
CASVIT_INLINE __m256i first_lanes(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}
CASVIT_INLINE void store_first(float* p, Vec a, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), a);
}
CASVIT_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
CASVIT_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
CASVIT_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
CASVIT_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
CASVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
CASVIT_INLINE Vec max_keep_nan(Vec a, Vec b) { return _mm256_max_ps(a, b); }
CASVIT_INLINE Vec min_keep_nan(Vec a, Vec b) { return _mm256_min_ps(a, b); }
CASVIT_INLINE Vec where_positive(Vec condition, Vec a) {
  return _mm256_and_ps(_mm256_cmp_ps(condition, zero(), _CMP_NLE_UQ), a);
}
CASVIT_INLINE Vec round_even(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CASVIT_INLINE Vec scale_by_power(Vec a, Vec n) {
  // Half of it first: 2^128 is no float, although its product with a may be one.
  __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(126));
  const Vec half = mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
  return add(half, half);
}

CASVIT_INLINE Vec load_as_float(const float* p) { return load(p); }
CASVIT_INLINE Vec load_as_float(const Bf16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
CASVIT_INLINE Vec load_as_float(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
CASVIT_INLINE __m128i to_bf16(Vec a) {
  __m256i bits = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
CASVIT_INLINE void store_first(Bf16* p, Vec a, int n) {
  alignas(16) uint16_t bits[VL];
  _mm_store_si128(reinterpret_cast<__m128i*>(bits), to_bf16(a));
  std::memcpy(p, bits, sizeof(uint16_t) * static_cast<size_t>(n));
}
CASVIT_INLINE void store_first(F16* p, Vec a, int n) {
  alignas(16) uint16_t bits[VL];
  _mm_store_si128(reinterpret_cast<__m128i*>(bits),
                  _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  std::memcpy(p, bits, sizeof(uint16_t) * static_cast<size_t>(n));
}

CASVIT_INLINE Vec magnitude(Vec a) { return _mm256_andnot_ps(splat(-0.0f), a); }
// An entry of a table of 16 for each lane; the index is in the lowest bits of m.
using Index = __m256i;
CASVIT_INLINE Index index16(Vec m) { return _mm256_castps_si256(m); }
CASVIT_INLINE Vec lookup16(const float* table, Index i) {
  const Vec low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), i);
  const Vec high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}

CASVIT_INLINE void transpose(Vec (&r)[VL]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

CASVIT_INLINE Vec horizontal_sums(const float* p) {
  __m256 t[4], u[2];
  for (int i = 0; i < 4; ++i) {
    __m256 a = load(p + 2 * i * VL), b = load(p + (2 * i + 1) * VL);
    t[i] = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    __m256d a = _mm256_castps_pd(t[2 * i]), b = _mm256_castps_pd(t[2 * i + 1]);
    u[i] =
        add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return add(_mm256_permute2f128_ps(u[0], u[1], 0x20), _mm256_permute2f128_ps(u[0], u[1], 0x31));
}

}  // namespace CASVIT_ISA
}  // namespace casvit
