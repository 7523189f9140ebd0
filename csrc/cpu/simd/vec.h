// Vec: VL float lanes of the instruction set this translation unit is compiled for (isa/*.cpp), and
// what all of them have in common. Everything is in the namespace CASVIT_ISA and local to its unit:
// no function compiled for one instruction set can be linked into another's.
#pragma once

#if defined(__AVX512F__)
#include "cpu/simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/simd/vec_avx2.h"
#else
#include "cpu/simd/vec_portable.h"
#endif

namespace casvit {
namespace CASVIT_ISA {

#if !defined(__AVX512F__)
// The first n elements, then zeros.
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

// One element as a float: the slow path of strided maps.
CASVIT_INLINE float widen_one(const float* p) { return *p; }
template <class T>
CASVIT_INLINE float widen_one(const T* p) {
  T lanes[VL] = {};
  lanes[0] = *p;
  alignas(64) float out[VL];
  store(out, load_as_float(lanes));
  return out[0];
}

}  // namespace CASVIT_ISA
}  // namespace casvit
