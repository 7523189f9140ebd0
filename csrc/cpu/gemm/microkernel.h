// A GEMM over Vec: packed rows (pixels or channels) times blocks of VL packed weight columns.
//   panel    [k_steps][PANEL_ROWS]
//   weights  [block][k_steps][VL columns]
// A K step is 32 bits: one float, or two bf16 of which a dot product takes both. Both operands are
// packed, from either memory order, so that the microkernel reads consecutive memory.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int PANEL_ROWS = 16;
constexpr int MR =
    VL == 16 ? 8 : 4;  // rows of the microkernel, MR x 3 blocks: what fits the registers

struct FmaF32 {
  static constexpr int K = 1;  // values of a K step
  CASVIT_INLINE Vec pack(Vec first, Vec) { return first; }
  // VL K steps of a row: its first n values, then zeros.
  template <class T>
  CASVIT_INLINE Vec load_k(const T* row, int64_t n) {
    return load_first_as_float(row, static_cast<int>(n < VL ? n : VL));
  }
  CASVIT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// bf16 values are not rounded; denormals count as zeros, as in the instruction.
struct DotBf16 {
  static constexpr int K = 2;
  CASVIT_INLINE Vec pack(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first)));
    const __m512i high =
        _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  template <class T>
  CASVIT_INLINE Vec load_k(const T* row, int64_t n) {
    const int first = static_cast<int>(n < VL ? n : VL);
    const int second = static_cast<int>(n < VL ? 0 : n < 2 * VL ? n - VL : VL);
    return reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(
        load_first_as_float(row + (second ? VL : 0), second), load_first_as_float(row, first)));
  }
  CASVIT_INLINE Vec load_k(const Bf16* row, int64_t n) {
    const __mmask32 lanes = n < 2 * VL ? (__mmask32{1} << n) - 1 : ~__mmask32{0};
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, row));
  }
  CASVIT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

// Calls f with the multiply-add of a precision.
template <class F>
CASVIT_INLINE auto with_mac(Precision precision, const F& f) {
#if defined(__AVX512BF16__)
  if (precision == Precision::BF16) return f(DotBf16{});
#endif
  (void)precision;
  return f(FmaF32{});
}

template <class Mac>
CASVIT_INLINE int64_t k_steps_of(int64_t values) {
  return (values + Mac::K - 1) / Mac::K;
}

// Packs ROWS rows of n values to [k_steps][ROWS]. at(i): row i, whose values are consecutive.
template <class Mac, int ROWS, class At>
CASVIT_INLINE void pack_row_major(const At& at, int64_t n, float* to) {
  for (int64_t left = n; left > 0; left -= VL * Mac::K, to += VL * ROWS) {
    const int64_t k_steps = k_steps_of<Mac>(left) < VL ? k_steps_of<Mac>(left) : VL;
    for (int j = 0; j < ROWS; j += VL) {
      Vec r[VL];
      for (int i = 0; i < VL; ++i) r[i] = Mac::load_k(at(j + i) + (n - left), left);
      transpose(r);
      for (int64_t t = 0; t < k_steps; ++t) store(to + t * ROWS + j, r[t]);
    }
  }
}
// The same; at(k): value k of row 0, with that of the other rows behind it. Rows from `count` on
// are zeros.
template <class Mac, int ROWS, class At>
CASVIT_INLINE void pack_column_major(const At& at, int64_t n, int64_t count, float* to) {
  for (int64_t k = 0; k < n; k += Mac::K, to += ROWS)
    for (int j = 0; j < ROWS; j += VL) {
      const int lanes = static_cast<int>(count - j < 0 ? 0 : count - j < VL ? count - j : VL);
      auto values = [&](int64_t i) __attribute__((always_inline)) {
        return i < n && lanes > 0 ? load_first_as_float(at(i) + j, lanes) : zero();
      };
      store(to + j, Mac::pack(values(k), Mac::K > 1 ? values(k + 1) : zero()));
    }
}
// The same for any strides: at(i, k) is value k of row i.
template <class Mac, int ROWS, class At>
CASVIT_INLINE void pack_strided(const At& at, int64_t n, int64_t count, float* to) {
  alignas(64) float values[Mac::K][ROWS];
  for (int64_t k = 0; k < n; k += Mac::K, to += ROWS) {
    for (int m = 0; m < Mac::K; ++m)
      for (int i = 0; i < ROWS; ++i)
        values[m][i] = i < count && k + m < n ? widen_one(at(i, k + m)) : 0.0f;
    for (int j = 0; j < ROWS; j += VL)
      store(to + j, Mac::pack(load(values[0] + j), load(values[Mac::K - 1] + j)));
  }
}

// Prefetches into the L2 cache what is to be packed next, a few cache lines at a time between
// microkernels: `rows` rows of `bytes` each, spread over `calls` calls of step().
class Prefetcher {
 public:
  Prefetcher(const void* from, int64_t bytes, int64_t rows, int64_t stride, int64_t calls)
      : from_(static_cast<const char*>(from)), bytes_(bytes), rows_(rows), stride_(stride) {
    const int64_t lines = rows * ((bytes + 63) / 64);
    each_ = calls > 0 ? (lines + calls - 1) / calls : 0;
  }
  inline __attribute__((always_inline)) void step() {
    for (int64_t i = 0; i < each_ && rows_ > 0; ++i) {
      __builtin_prefetch(from_ + at_, 0, 2);
      if ((at_ += 64) >= bytes_) at_ = 0, from_ += stride_, --rows_;
    }
  }

 private:
  const char* from_;
  int64_t bytes_, rows_, stride_, each_, at_ = 0;
};

// MR rows of a panel times BLOCKS blocks of weights. Row i of block b goes to sums[b] + to[i]; it
// is added to what is there if `add_up`, else to `bias` or 0.
template <class Mac, int BLOCKS>
CASVIT_INLINE void microkernel(const float* panel, int64_t k_steps, const float* weights,
                               const float* bias, bool add_up, const int64_t* to, int64_t count,
                               float* const (&sums)[3]) {
  constexpr int N = MR;
  // Chains of at most 128 K steps in registers: the rounding errors of one long chain add up to a
  // decimal digit.
  for (int64_t begin = 0; begin < k_steps; begin += 128) {
    const int64_t end = begin + 128 < k_steps ? begin + 128 : k_steps;
    Vec acc[N][BLOCKS];
    for (int b = 0; b < BLOCKS; ++b)
      for (int i = 0; i < N; ++i) acc[i][b] = begin || !bias ? zero() : load(bias + b * VL);
    for (int64_t t = begin; t < end; ++t) {
      Vec w[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) w[b] = load(weights + (b * k_steps + t) * VL);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const Vec value = splat(panel[t * PANEL_ROWS + i]);
#pragma GCC unroll 3
        for (int b = 0; b < BLOCKS; ++b) acc[i][b] = Mac::multiply_add(value, w[b], acc[i][b]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if (i >= count) break;
      for (int b = 0; b < BLOCKS; ++b) {
        float* sum = sums[b] + to[i];
        store(sum, begin || add_up ? add(load(sum), acc[i][b]) : acc[i][b]);
      }
    }
  }
}
// The first `count` rows of a panel times 1 to 3 blocks. `next`: from the sums of a block to those
// of the next.
template <class Mac>
CASVIT_INLINE void gemm_panel(const float* panel, int64_t k_steps, const float* weights,
                              int64_t blocks, const float* bias, bool add_up, const int64_t* to,
                              int64_t count, float* sums, int64_t next) {
  float* const of[3] = {sums, sums + (blocks > 1 ? next : 0), sums + (blocks > 2 ? 2 * next : 0)};
  for (int64_t i = 0; i < count; i += MR) {
    const int64_t* places = to + i;
    if (blocks == 3)
      microkernel<Mac, 3>(panel + i, k_steps, weights, bias, add_up, places, count - i, of);
    else if (blocks == 2)
      microkernel<Mac, 2>(panel + i, k_steps, weights, bias, add_up, places, count - i, of);
    else microkernel<Mac, 1>(panel + i, k_steps, weights, bias, add_up, places, count - i, of);
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
