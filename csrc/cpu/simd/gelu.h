// GELU, the exact one (erf), by a table of polynomials.
#pragma once

#include "cpu/simd/gelu_table.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// ReLU(x) plus the difference, which is small and even: one rounding of x's size. NaN stays NaN.
template <int DEGREE>
CASVIT_INLINE Vec gelu_by_table(Vec x, const float (&table)[DEGREE + 1][16], float range) {
  const float step = range / 15.0f;
  const Vec t = min_keep_nan(splat(range), magnitude(x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
  const Vec magic = splat(12582912.0f);
  const Vec m = fma(t, splat(1.0f / step), magic);
  const Index i = index16(m);
  const Vec d = fma(sub(magic, m), splat(step), t);
  Vec p = lookup16(table[DEGREE], i);
#pragma GCC unroll 5
  for (int k = DEGREE - 1; k >= 0; --k) p = fma(p, d, lookup16(table[k], i));
  return add(max_keep_nan(zero(), x), p);
}

// Error below 5e-8 for |x| < 1, below 2.5e-7 everywhere: half an ulp of x.
CASVIT_INLINE Vec gelu(Vec x) { return gelu_by_table<5>(x, GELU_FINE, GELU_FINE_RANGE); }

// Error below 1.1e-4, to be rounded to bf16.
CASVIT_INLINE Vec gelu_coarse(Vec x) { return gelu_by_table<2>(x, GELU_COARSE, GELU_COARSE_RANGE); }

}  // namespace CASVIT_ISA
}  // namespace casvit
