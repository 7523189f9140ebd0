// Functions of a Vec.
#pragma once

#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// exp(a) as p * 2^n, n integral.
CASVIT_INLINE Vec exp_mantissa(Vec a, Vec& n) {
  n = round_even(mul(a, splat(1.44269504088896341f)));
  Vec r = fma(n, splat(-0.693359375f), a);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return add(fma(mul(p, r), r, r), splat(1.0f));
}

// exp(a) for a in [-80, 89], infinite where it overflows, NaN for NaN; relative error below 2 ulp.
CASVIT_INLINE Vec exp(Vec a) {
  Vec n;
  const Vec p = exp_mantissa(a, n);
  return scale_by_power(p, n);
}

// exp(a) for a <= 0, with subnormal numbers and 0 below them, NaN for NaN.
CASVIT_INLINE Vec exp_to_zero(Vec a) {
  Vec n;
  const Vec p = exp_mantissa(max_keep_nan(splat(-104.0f), a), n);
  const Vec most = max_keep_nan(splat(-100.0f), n);  // of one step of scale_by_power
  return scale_by_power(scale_by_power(p, most), sub(n, most));
}

// 0 where exp(-a) overflows, as PyTorch's: a closed gate lets nothing through, however large. From
// -17 on down, exp is lost in 1 + exp.
CASVIT_INLINE Vec sigmoid(Vec a) {
  Vec negated = sub(zero(), a);
  negated = min_keep_nan(splat(89.0f), max_keep_nan(splat(-80.0f), negated));
  return div(splat(1.0f), add(splat(1.0f), exp(negated)));
}

}  // namespace CASVIT_ISA
}  // namespace casvit
