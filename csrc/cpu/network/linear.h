// The GEMMs of a whole network over Vec: tiles of pixels times blocks of outputs, the operand read
// as it lies, a word at a time, and what follows a layer done to the sums in registers.
#pragma once

#include "cpu/gemm/microkernel.h"
#include "cpu/mixer/depthwise.h"
#include "cpu/network/layout.h"
#include "cpu/simd/gelu.h"

namespace casvit {
namespace CASVIT_ISA {

// Pixels of a tile by the blocks of a group: what fits the registers.
template <int BLOCKS>
constexpr int TILE_PIXELS = VL == 16  ? (BLOCKS == 3 ? 8 : 14)
                            : VL == 8 ? (BLOCKS == 3 ? 4 : 6)
                                      : (BLOCKS == 3 ? 3 : 4);

template <class Mac>
constexpr int WORDS = VL / Mac::K;  // of a channel block in an operand

CASVIT_INLINE void put_words(FmaF32, float* to, Vec v) { store(to, v); }
CASVIT_INLINE Vec gelu_for(FmaF32, Vec v) { return gelu(v); }
#if defined(__AVX512BF16__)
CASVIT_INLINE void put_words(DotBf16, float* to, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
CASVIT_INLINE Vec gelu_for(DotBf16, Vec v) { return gelu_coarse(v); }
#endif

// PIXELS pixels, STRIDE words apart, times BLOCKS blocks, of a group of `group` blocks. `ahead`:
// what the next call reads, drawn into the L2 cache meanwhile, `line` bytes at a time.
template <class Mac, int PIXELS, int BLOCKS, int STRIDE>
static __attribute__((noinline)) void linear_tile(const Operand& a, const float* data,
                                                  int64_t term_stride, const float* w,
                                                  int64_t group, const float* bias, int64_t most,
                                                  const Epilogue& e, int64_t pixel, int64_t block,
                                                  const char* ahead, int64_t line) {
  Vec acc[PIXELS][BLOCKS];
#pragma GCC unroll 3
  for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 14
    for (int i = 0; i < PIXELS; ++i) acc[i][b] = zero();
  alignas(64) float sums[PIXELS * BLOCKS * VL];
  const int64_t w_step = group * VL;
  auto step = [&](const float* from) __attribute__((always_inline)) {
    Vec wb[BLOCKS];
#pragma GCC unroll 3
    for (int b = 0; b < BLOCKS; ++b) wb[b] = load(w + b * VL);
    w += w_step;
#pragma GCC unroll 14
    for (int i = 0; i < PIXELS; ++i) {
      const Vec value = splat(from[i * STRIDE]);
#pragma GCC unroll 3
      for (int b = 0; b < BLOCKS; ++b) acc[i][b] = Mac::multiply_add(value, wb[b], acc[i][b]);
    }
  };
  int64_t chain = 0;
  bool summed = false;
  for (int64_t s = 0; s < a.segments; ++s) {
    const float* from = data + a.offset[s];
    int64_t left = a.k_steps[s];
    if (chain + left > most && chain > 0) {
      chain = 0;
#pragma GCC unroll 14
      for (int i = 0; i < PIXELS; ++i)
#pragma GCC unroll 3
        for (int b = 0; b < BLOCKS; ++b) {
          float* sum = sums + (i * BLOCKS + b) * VL;
          store(sum, summed ? add(load(sum), acc[i][b]) : acc[i][b]);
          acc[i][b] = zero();
        }
      summed = true;
    }
    chain += left;
    for (; left >= 4; left -= 4, from += 4 * term_stride) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + line, 0, 2);
      ahead += 2 * line;
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) step(from + k * term_stride);
    }
    for (; left > 0; --left, from += term_stride) step(from);
  }
  if (summed)
#pragma GCC unroll 14
    for (int i = 0; i < PIXELS; ++i)
#pragma GCC unroll 3
      for (int b = 0; b < BLOCKS; ++b)
        acc[i][b] = add(load(sums + (i * BLOCKS + b) * VL), acc[i][b]);
  // Last: in front it would be in the rounding of every partial sum.
#pragma GCC unroll 3
  for (int b = 0; b < BLOCKS; ++b) {
    const Vec own = load(bias + b * VL);
#pragma GCC unroll 14
    for (int i = 0; i < PIXELS; ++i) acc[i][b] = add(acc[i][b], own);
  }

  auto each = [&](auto finish) __attribute__((always_inline)) {
#pragma GCC unroll 3
    for (int b = 0; b < BLOCKS; ++b)
#pragma GCC unroll 14
      for (int i = 0; i < PIXELS; ++i) finish(i, b, acc[i][b]);
  };
  float* to = e.to + block * e.block_stride;
  const int64_t stride = e.block_stride;
  switch (e.kind) {
    case Epilogue::STORE:
      to += pixel * VL;
      each([=](int i, int b, Vec v)
               __attribute__((always_inline)) { store(to + b * stride + i * VL, v); });
      break;
    case Epilogue::RELU:
      to += pixel * VL;
      each([=](int i, int b, Vec v) __attribute__((always_inline)) {
        store(to + b * stride + i * VL, max_keep_nan(zero(), v));
      });
      break;
    case Epilogue::ADD: {
      to += pixel * VL;
      const float* residual = e.residual + block * stride + pixel * VL;
      each([=](int i, int b, Vec v) __attribute__((always_inline)) {
        store(to + b * stride + i * VL, add(v, load(residual + b * stride + i * VL)));
      });
      break;
    }
    case Epilogue::GELU:
      to += pixel * WORDS<Mac>;
      each([=](int i, int b, Vec v) __attribute__((always_inline)) {
        put_words(Mac{}, to + b * stride + i * WORDS<Mac>, gelu_for(Mac{}, v));
      });
      break;
    case Epilogue::PLACES: {
      const int64_t* places = e.places + pixel;
      each([=](int i, int b, Vec v)
               __attribute__((always_inline)) { store(to + b * stride + places[i], v); });
      break;
    }
    case Epilogue::ROWS:
      for (int b = 0; b < BLOCKS; ++b) {
        const int64_t left = e.row - (block + b) * VL;
        const int lanes = static_cast<int>(left < VL ? left : VL);
        for (int i = 0; i < PIXELS; ++i)
          store_first(e.to + (pixel + i) * e.row + (block + b) * VL, acc[i][b], lanes);
      }
      break;
  }
}

// All pixels with BLOCKS blocks of a group whose tiles have PIXELS pixels; what is left in tiles of
// half, a quarter, ... of that.
template <class Mac, int PIXELS, int BLOCKS, int STRIDE>
CASVIT_INLINE void linear_pixels(const Operand& a, int64_t term_stride, const float* w,
                                 int64_t group, const float* bias, int64_t chain, int64_t first,
                                 int64_t count, const Epilogue& e, int64_t block, const char* ahead,
                                 int64_t lines) {
  for (; first + PIXELS <= count; first += PIXELS) {
    linear_tile<Mac, PIXELS, BLOCKS, STRIDE>(a, a.data + first * STRIDE, term_stride, w, group,
                                             bias, chain, e, first, block, ahead,
                                             lines > 0 ? 64 : 0);
    int64_t drawn = 0;
    for (int64_t s = 0; s < a.segments && lines > 0; ++s) drawn += a.k_steps[s] / 4 * 2;
    ahead += drawn * 64;
    lines -= drawn;
  }
  if constexpr (PIXELS > 1)
    linear_pixels<Mac, PIXELS / 2, BLOCKS, STRIDE>(a, term_stride, w, group, bias, chain, first,
                                                   count, e, block, ahead, lines);
}

template <class Mac, int STRIDE>
static void linear_of(const Linear& l, const Operand& a, int64_t term_stride, int64_t count,
                      int64_t begin, int64_t end, const Epilogue& e, const float* next) {
  for (int64_t block = begin; block < end;) {
    const int64_t first = block / l.group * l.group;
    const int64_t group = l.blocks - first < l.group ? l.blocks - first : l.group;
    const int64_t stop = first + group < end ? first + group : end, blocks = stop - block;
    const float* w = l.weights + first * l.k_steps * VL + (block - first) * VL;
    const float* bias = l.bias + block * VL;
    const float* after = l.weights + (first + group) * l.k_steps * VL;
    const char* ahead = reinterpret_cast<const char*>(stop < end ? after : next ? next : w);
    // Of what follows a whole group at most; whoever is past the end prefetches what is there.
    const int64_t lines = stop < end || next ? group * l.k_steps * VL * 4 / 64 : 0;
    auto of = [&](auto pixels, auto width) __attribute__((always_inline)) {
      linear_pixels<Mac, decltype(pixels)::value, decltype(width)::value, STRIDE>(
          a, term_stride, w, group, bias, l.chain, 0, count, e, block, ahead, lines);
    };
    if (l.group == 3) {
      if (blocks == 3) of(Count<TILE_PIXELS<3>>{}, Count<3>{});
      else if (blocks == 2) of(Count<TILE_PIXELS<3>>{}, Count<2>{});
      else of(Count<TILE_PIXELS<3>>{}, Count<1>{});
    } else {
      if (blocks == 2) of(Count<TILE_PIXELS<2>>{}, Count<2>{});
      else of(Count<TILE_PIXELS<2>>{}, Count<1>{});
    }
    block = stop;
  }
}

static void network_linear(const Linear& l, const Operand& a, Precision precision, int64_t count,
                           int64_t begin, int64_t end, const Epilogue& e, const float* next) {
  with_mac(precision, [&](auto mac) {
    using Mac = decltype(mac);
    linear_of<Mac, WORDS<Mac>>(l, a, 1, count, begin, end, e, next);
  });
}

static void network_stem_linear(const Linear& l, const Operand& a, int64_t term_stride,
                                Precision precision, int64_t count, const Epilogue& e,
                                const float* next) {
  with_mac(precision, [&](auto mac) {
    linear_of<decltype(mac), 2>(l, a, term_stride, count, 0, l.blocks, e, next);
  });
}

static int64_t network_words(Precision precision) {
#if !defined(__AVX512BF16__)
  if (precision == Precision::BF16) return 0;
#endif
  return with_mac(precision, [](auto mac) -> int64_t { return WORDS<decltype(mac)>; });
}

static int64_t network_k_steps(int64_t K, Precision precision) {
  return with_mac(precision, [=](auto mac) { return k_steps_of<decltype(mac)>(K); });
}

static void network_pack(const float* matrix, int64_t outputs, int64_t K, int64_t segment,
                         Precision precision, int64_t blocks, float* to) {
  with_mac(precision, [=](auto mac) {
    using Mac = decltype(mac);
    const int64_t steps = k_steps_of<Mac>(segment);
    for (int64_t s = 0; s < K / segment; ++s)
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t b = 0; b < blocks; ++b) {
          alignas(64) float values[2][VL] = {};
          for (int64_t lane = 0; lane < VL; ++lane)
            for (int64_t m = 0; m < Mac::K; ++m) {
              const int64_t output = b * VL + lane, k = t * Mac::K + m;
              if (output < outputs && k < segment)
                values[m][lane] = matrix[output * K + s * segment + k];
            }
          store(to + ((s * steps + t) * blocks + b) * VL,
                Mac::pack(load(values[0]), load(values[1])));
        }
  });
}

static int64_t network_multiply_adds(Precision precision, int64_t rounds) {
  if (network_words(precision) == 0) return 0;
  return with_mac(precision, [=](auto mac) -> int64_t {
    using Mac = decltype(mac);
    constexpr int CHAINS = VL == 16 ? 24 : 12;
    Vec acc[CHAINS];
    for (int i = 0; i < CHAINS; ++i) acc[i] = zero();
    const Vec a = in_register(splat(0.5f)), b = in_register(splat(0.25f));
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
      for (int i = 0; i < CHAINS; ++i) acc[i] = in_register(Mac::multiply_add(a, b, acc[i]));
    }
    alignas(64) float keep[VL];
    for (int i = 0; i < CHAINS; ++i) store(keep, acc[i]);
    asm volatile("" : : "r"(keep) : "memory");
    return rounds * CHAINS * VL * Mac::K;
  });
}

}  // namespace CASVIT_ISA
}  // namespace casvit
