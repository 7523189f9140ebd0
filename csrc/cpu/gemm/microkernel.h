// Products of matrices, written once over Vec: of lines of numbers with the columns of weights.
//   panel    [terms][PANEL lines]
//   weights  [block][terms][VL outputs]
// A term is 32 bits: one float, or two bf16 whose products are summed. Both operands are packed,
// from either memory order, so that what is multiplied lies in the order in which it is read.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int PANEL = 16;                        // lines
constexpr int LINES_AT_ONCE = VL == 16 ? 8 : 4;  // times 3 blocks: what the registers hold

struct Floats {
  static constexpr int NUMBERS = 1;  // of a term
  CASVIT_INLINE Vec of(Vec first, Vec) { return first; }
  // VL terms of a line: its first n numbers, then zeros.
  template <class T>
  CASVIT_INLINE Vec along(const T* line, int64_t n) {
    return load_first_as_float(line, static_cast<int>(n < VL ? n : VL));
  }
  CASVIT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// bf16 numbers pass unrounded; denormals count as zeros, as in the instruction.
struct Pairs {
  static constexpr int NUMBERS = 2;
  CASVIT_INLINE Vec of(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first)));
    const __m512i high =
        _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  template <class T>
  CASVIT_INLINE Vec along(const T* line, int64_t n) {
    const int first = static_cast<int>(n < VL ? n : VL);
    const int second = static_cast<int>(n < VL ? 0 : n < 2 * VL ? n - VL : VL);
    return reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(
        load_first_as_float(line + (second ? VL : 0), second), load_first_as_float(line, first)));
  }
  CASVIT_INLINE Vec along(const Bf16* line, int64_t n) {
    const __mmask32 lanes = n < 2 * VL ? (__mmask32{1} << n) - 1 : ~__mmask32{0};
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, line));
  }
  CASVIT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

// f of the terms in which a product is computed.
template <class F>
CASVIT_INLINE auto with_terms(Product kind, const F& f) {
#if defined(__AVX512BF16__)
  if (kind == Product::BF16) return f(Pairs{});
#endif
  (void)kind;
  return f(Floats{});
}

template <class Terms>
CASVIT_INLINE int64_t terms_of(int64_t numbers) {
  return (numbers + Terms::NUMBERS - 1) / Terms::NUMBERS;
}

// LINES lines of n numbers to [terms][LINES]. at(i): line i, whose numbers are consecutive.
template <class Terms, int LINES, class At>
CASVIT_INLINE void pack_along(const At& at, int64_t n, float* to) {
  for (int64_t left = n; left > 0; left -= VL * Terms::NUMBERS, to += VL * LINES) {
    const int64_t terms = terms_of<Terms>(left) < VL ? terms_of<Terms>(left) : VL;
    for (int j = 0; j < LINES; j += VL) {
      Vec r[VL];
      for (int i = 0; i < VL; ++i) r[i] = Terms::along(at(j + i) + (n - left), left);
      transpose(r);
      for (int64_t t = 0; t < terms; ++t) store(to + t * LINES + j, r[t]);
    }
  }
}
// The same; at(k): number k of the lines, which are consecutive. Lines from `count` on are zeros.
template <class Terms, int LINES, class At>
CASVIT_INLINE void pack_across(const At& at, int64_t n, int64_t count, float* to) {
  for (int64_t k = 0; k < n; k += Terms::NUMBERS, to += LINES)
    for (int j = 0; j < LINES; j += VL) {
      const int lanes = static_cast<int>(count - j < 0 ? 0 : count - j < VL ? count - j : VL);
      auto numbers = [&](int64_t i) __attribute__((always_inline)) {
        return i < n && lanes > 0 ? load_first_as_float(at(i) + j, lanes) : zero();
      };
      store(to + j, Terms::of(numbers(k), Terms::NUMBERS > 1 ? numbers(k + 1) : zero()));
    }
}
// The same of numbers anywhere: at(i, k), number k of line i.
template <class Terms, int LINES, class At>
CASVIT_INLINE void pack_scattered(const At& at, int64_t n, int64_t count, float* to) {
  alignas(64) float numbers[Terms::NUMBERS][LINES];
  for (int64_t k = 0; k < n; k += Terms::NUMBERS, to += LINES) {
    for (int m = 0; m < Terms::NUMBERS; ++m)
      for (int i = 0; i < LINES; ++i)
        numbers[m][i] = i < count && k + m < n ? widen_one(at(i, k + m)) : 0.0f;
    for (int j = 0; j < LINES; j += VL)
      store(to + j, Terms::of(load(numbers[0] + j), load(numbers[Terms::NUMBERS - 1] + j)));
  }
}

// Fetches into the second-level cache what is to be packed next, a little at a time while something
// else is multiplied: `rows` pieces of `bytes` each, all of them in so many calls of some().
class Ahead {
 public:
  Ahead(const void* from, int64_t bytes, int64_t rows, int64_t stride, int64_t calls)
      : from_(static_cast<const char*>(from)), bytes_(bytes), rows_(rows), stride_(stride) {
    const int64_t lines = rows * ((bytes + 63) / 64);
    each_ = calls > 0 ? (lines + calls - 1) / calls : 0;
  }
  inline __attribute__((always_inline)) void some() {
    for (int64_t i = 0; i < each_ && rows_ > 0; ++i) {
      __builtin_prefetch(from_ + at_, 0, 2);
      if ((at_ += 64) >= bytes_) at_ = 0, from_ += stride_, --rows_;
    }
  }

 private:
  const char* from_;
  int64_t bytes_, rows_, stride_, each_, at_ = 0;
};

// LINES_AT_ONCE lines of a panel with BLOCKS blocks of weights. Sums of line i: block b's are at
// sums[b] + to[i], and start there, if `add_up`, or at `bias`, or at 0.
template <class Terms, int BLOCKS>
CASVIT_INLINE void multiply(const float* panel, int64_t terms, const float* weights,
                            const float* bias, bool add_up, const int64_t* to, int64_t count,
                            float* const (&sums)[3]) {
  constexpr int N = LINES_AT_ONCE;
  // At most 128 terms are added up in registers: one long chain would lose a digit.
  for (int64_t begin = 0; begin < terms; begin += 128) {
    const int64_t end = begin + 128 < terms ? begin + 128 : terms;
    Vec acc[N][BLOCKS];
    for (int b = 0; b < BLOCKS; ++b)
      for (int i = 0; i < N; ++i) acc[i][b] = begin || !bias ? zero() : load(bias + b * VL);
    for (int64_t t = begin; t < end; ++t) {
      Vec w[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) w[b] = load(weights + (b * terms + t) * VL);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const Vec number = splat(panel[t * PANEL + i]);
#pragma GCC unroll 3
        for (int b = 0; b < BLOCKS; ++b) acc[i][b] = Terms::multiply_add(number, w[b], acc[i][b]);
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
// The first `count` lines of a panel with 1 to 3 blocks. `next`: from a block's sums to the next's.
template <class Terms>
CASVIT_INLINE void multiply_panel(const float* panel, int64_t terms, const float* weights,
                                  int64_t blocks, const float* bias, bool add_up, const int64_t* to,
                                  int64_t count, float* sums, int64_t next) {
  float* const of[3] = {sums, sums + (blocks > 1 ? next : 0), sums + (blocks > 2 ? 2 * next : 0)};
  for (int64_t i = 0; i < count; i += LINES_AT_ONCE) {
    const int64_t* places = to + i;
    if (blocks == 3)
      multiply<Terms, 3>(panel + i, terms, weights, bias, add_up, places, count - i, of);
    else if (blocks == 2)
      multiply<Terms, 2>(panel + i, terms, weights, bias, add_up, places, count - i, of);
    else multiply<Terms, 1>(panel + i, terms, weights, bias, add_up, places, count - i, of);
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
