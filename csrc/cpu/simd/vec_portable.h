// Vec on the vector type of GCC and clang: 4 lanes, which become NEON, SSE2 or scalars. As an array
// of floats it took three times as long to compile.
#pragma once

#include "cpu/simd/types.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int VL = 4;
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
struct Vec {
  Float4 v;
};

#define CASVIT_LANES(expression)                      \
  Vec r;                                              \
  for (int i = 0; i < VL; ++i) r.v[i] = (expression); \
  return r
CASVIT_INLINE Vec splat(float a) { return {Float4{a, a, a, a}}; }
CASVIT_INLINE Vec zero() { return splat(0.0f); }
CASVIT_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
CASVIT_INLINE Vec in_register(Vec a) { return a; }
CASVIT_INLINE void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
CASVIT_INLINE void store_first(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
CASVIT_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
CASVIT_INLINE Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
CASVIT_INLINE Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
CASVIT_INLINE Vec div(Vec a, Vec b) { return {a.v / b.v}; }
// std::fma would be a library call without the instruction.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
CASVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }  // contracts
#else
// One rounding by way of double: slower than rounding the product as well, but half the error.
CASVIT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  const Double4 product =
      __builtin_convertvector(a.v, Double4) * __builtin_convertvector(b.v, Double4);
  return {__builtin_convertvector(product + __builtin_convertvector(c.v, Double4), Float4)};
}
#endif
CASVIT_INLINE Vec max_keep_nan(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
CASVIT_INLINE Vec min_keep_nan(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
CASVIT_INLINE Vec where_positive(Vec condition, Vec a) {
  CASVIT_LANES(condition.v[i] <= 0.0f ? 0.0f : a.v[i]);
}
CASVIT_INLINE Vec round_even(Vec a) { CASVIT_LANES(__builtin_rintf(a.v[i])); }
CASVIT_INLINE float power_of_two(float n) {
  // The conversion of NaN to an integer is undefined; the other factor carries the NaN on.
  int32_t bits = (static_cast<int32_t>(n == n ? n : 0.0f) + 127) << 23;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
CASVIT_INLINE Vec scale_by_power(Vec a, Vec n) {
  // Half of it first: 2^128 is no float, although its product with a may be one.
  Vec power;
  for (int i = 0; i < VL; ++i) power.v[i] = power_of_two(n.v[i] - 1.0f);
  const Vec half = mul(a, power);
  return add(half, half);
}

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
      const float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}
CASVIT_INLINE Vec magnitude(Vec a) { CASVIT_LANES(__builtin_fabsf(a.v[i])); }
// An entry of a table of 16 for each lane; the index is in the lowest bits of m.
struct Index {
  uint32_t lane[VL];
};
CASVIT_INLINE Index index16(Vec m) {
  Index index;
  for (int i = 0; i < VL; ++i) index.lane[i] = as_bits(m.v[i]) & 15u;
  return index;
}
CASVIT_INLINE Vec lookup16(const float* table, Index index) { CASVIT_LANES(table[index.lane[i]]); }
CASVIT_INLINE Vec horizontal_sums(const float* p) {
  CASVIT_LANES((p[i * VL] + p[i * VL + 1]) + (p[i * VL + 2] + p[i * VL + 3]));
}
#undef CASVIT_LANES

}  // namespace CASVIT_ISA
}  // namespace casvit
