// One float vector of VL lanes for the instruction set this translation unit is compiled for.
// Each unit defines CASVIT_ISA (a namespace); everything here is local to it, so that no function
// compiled for one instruction set can be linked into another's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace casvit {
namespace CASVIT_ISA {

#define CASVIT_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

constexpr int VL = 16;
using Vec = __m512;

CASVIT_INLINE Vec zero() { return _mm512_setzero_ps(); }
CASVIT_INLINE Vec splat(float a) { return _mm512_set1_ps(a); }
CASVIT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
// Keeps a loaded vector that is used more than once from being loaded again for every use.
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
// Both return b where b is NaN, so that a NaN input stays one.
CASVIT_INLINE Vec max_keep_nan(Vec a, Vec b) { return _mm512_max_ps(a, b); }
CASVIT_INLINE Vec min_keep_nan(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// a where condition > 0 or NaN, else 0.
CASVIT_INLINE Vec where_positive(Vec condition, Vec a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, zero(), _CMP_NLE_UQ), a);
}
CASVIT_INLINE Vec round_even(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n for integral n within the normal range.
CASVIT_INLINE Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

CASVIT_INLINE Vec load_as_float(const float* p) { return load(p); }
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
CASVIT_INLINE Vec load_as_float(const Bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
CASVIT_INLINE Vec load_as_float(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The elements of some lanes, zeros in the others, whose memory is not touched.
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

// r[j] lane i = from[i * stride + j]. Gathers quarters of rows first: an insertion from memory
// needs no shuffle, of which the CPU does but one a cycle.
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
CASVIT_INLINE Vec sum_each(const float* p) {
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

#elif defined(__AVX2__)

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
  __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}

CASVIT_INLINE Vec load_as_float(const float* p) { return load(p); }
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
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

CASVIT_INLINE Vec sum_each(const float* p) {
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

#else  // portable: four lanes the compiler maps to NEON, SSE2 or scalars

constexpr int VL = 4;
struct Vec {
  float v[VL];
};

#define CASVIT_LANES(expression)                      \
  Vec r;                                              \
  for (int i = 0; i < VL; ++i) r.v[i] = (expression); \
  return r
CASVIT_INLINE Vec splat(float a) { CASVIT_LANES(a); }
CASVIT_INLINE Vec zero() { return splat(0.0f); }
CASVIT_INLINE Vec load(const float* p) { CASVIT_LANES(p[i]); }
CASVIT_INLINE Vec in_register(Vec a) { return a; }
CASVIT_INLINE void store(float* p, Vec a) {
  for (int i = 0; i < VL; ++i) p[i] = a.v[i];
}
CASVIT_INLINE void store_first(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
CASVIT_INLINE Vec add(Vec a, Vec b) { CASVIT_LANES(a.v[i] + b.v[i]); }
CASVIT_INLINE Vec sub(Vec a, Vec b) { CASVIT_LANES(a.v[i] - b.v[i]); }
CASVIT_INLINE Vec mul(Vec a, Vec b) { CASVIT_LANES(a.v[i] * b.v[i]); }
CASVIT_INLINE Vec div(Vec a, Vec b) { CASVIT_LANES(a.v[i] / b.v[i]); }
// Not std::fma: without the instruction that is a library call.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
CASVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { CASVIT_LANES(a.v[i] * b.v[i] + c.v[i]); }  // contracts
#else
// Slower than rounding the product, too, but half the error.
CASVIT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  CASVIT_LANES(static_cast<float>(static_cast<double>(a.v[i]) * b.v[i] + c.v[i]));
}
#endif
CASVIT_INLINE Vec max_keep_nan(Vec a, Vec b) { CASVIT_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
CASVIT_INLINE Vec min_keep_nan(Vec a, Vec b) { CASVIT_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
CASVIT_INLINE Vec where_positive(Vec condition, Vec a) {
  CASVIT_LANES(condition.v[i] <= 0.0f ? 0.0f : a.v[i]);
}
CASVIT_INLINE Vec round_even(Vec a) { CASVIT_LANES(__builtin_rintf(a.v[i])); }
CASVIT_INLINE float power_of_two(float n) {
  // A NaN exponent must not reach the integer conversion; the caller's factor carries the NaN on.
  int32_t bits = (static_cast<int32_t>(n == n ? n : 0.0f) + 127) << 23;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
CASVIT_INLINE Vec scale_by_power(Vec a, Vec n) { CASVIT_LANES(a.v[i] * power_of_two(n.v[i])); }

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
CASVIT_INLINE float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
CASVIT_INLINE uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof f);
  return bits;
}
CASVIT_INLINE float widen(Bf16 h) { return as_float(static_cast<uint32_t>(h.bits) << 16); }
CASVIT_INLINE float widen(F16 h) {
  uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude << 13));
  // The exponent is rebiased by a multiplication, which also handles subnormals.
  return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}
CASVIT_INLINE Bf16 narrow_bf16(float f) {
  uint32_t bits = as_bits(f);
  if (f != f) return Bf16{0x7fc0};
  return Bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
CASVIT_INLINE F16 narrow_f16(float f) {
  uint32_t bits = as_bits(f), sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return F16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return F16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    float aligned = as_float(bits) + 0.5f;
    return F16{static_cast<uint16_t>(sign | (as_bits(aligned) - 0x3f000000u))};
  }
  bits += 0xfffu + ((bits >> 13) & 1u) - 0x38000000u;
  return F16{static_cast<uint16_t>(sign | (bits >> 13))};
}
CASVIT_INLINE Vec load_as_float(const float* p) { return load(p); }
CASVIT_INLINE Vec load_as_float(const Bf16* p) { CASVIT_LANES(widen(p[i])); }
CASVIT_INLINE Vec load_as_float(const F16* p) { CASVIT_LANES(widen(p[i])); }
CASVIT_INLINE void store_first(Bf16* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow_bf16(a.v[i]);
}
CASVIT_INLINE void store_first(F16* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow_f16(a.v[i]);
}
CASVIT_INLINE void transpose(Vec (&r)[VL]) {
  for (int i = 0; i < VL; ++i)
    for (int j = 0; j < i; ++j) {
      float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}
CASVIT_INLINE Vec sum_each(const float* p) {
  CASVIT_LANES((p[i * VL] + p[i * VL + 1]) + (p[i * VL + 2] + p[i * VL + 3]));
}
#undef CASVIT_LANES

#endif

#if !defined(__AVX512F__)
// The first n elements, zeros behind them.
template <class T>
CASVIT_INLINE Vec load_first_as_float(const T* p, int n) {
  if (n == VL) return load_as_float(p);
  T lanes[VL] = {};
  std::memcpy(lanes, p, sizeof(T) * static_cast<size_t>(n));
  return load_as_float(lanes);
}
// r[j] lane i = from[i * stride + j].
CASVIT_INLINE void load_transposed(const float* from, int64_t stride, Vec (&r)[VL]) {
  for (int i = 0; i < VL; ++i) r[i] = load(from + i * stride);
  transpose(r);
}
#endif
template <class T>
CASVIT_INLINE void load_transposed(const T* from, int64_t stride, Vec (&r)[VL]) {
  for (int i = 0; i < VL; ++i) r[i] = load_as_float(from + i * stride);
  transpose(r);
}
// The same of n rows, zeros in the other lanes.
template <class T>
CASVIT_INLINE void load_transposed(const T* from, int64_t stride, int n, Vec (&r)[VL]) {
  if (n == VL) return load_transposed(from, stride, r);
  for (int i = 0; i < VL; ++i) r[i] = i < n ? load_as_float(from + i * stride) : zero();
  transpose(r);
}

// One element as a float; the slow path of strided input.
CASVIT_INLINE float widen_one(const float* p) { return *p; }
template <class T>
CASVIT_INLINE float widen_one(const T* p) {
  T lanes[VL] = {};
  lanes[0] = *p;
  alignas(64) float out[VL];
  store(out, load_as_float(lanes));
  return out[0];
}

// exp(a) for a in [-87, 88], NaN for NaN; relative error below 2 ulp.
CASVIT_INLINE Vec exp(Vec a) {
  Vec n = round_even(mul(a, splat(1.44269504088896341f)));
  Vec r = fma(n, splat(-0.693359375f), a);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), splat(1.0f));
  return scale_by_power(p, n);
}

CASVIT_INLINE Vec sigmoid(Vec a) {
  Vec negated = sub(zero(), a);
  negated = min_keep_nan(splat(88.0f), max_keep_nan(splat(-87.0f), negated));
  return div(splat(1.0f), add(splat(1.0f), exp(negated)));
}

}  // namespace CASVIT_ISA
}  // namespace casvit
