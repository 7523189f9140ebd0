// Which lane holds which element, and the 2-byte floats. Formulas from the PTX manual; the Python
// test derives the same maps another way.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace casvit::cuda::emulation {

struct Place {
  int lane, word, half;  // half 0 is the low half of the word
};

// ldmatrix: element (row, column) of matrix i, an 8x8 matrix.
inline Place place_of_ldmatrix(int matrix, int row, int column, bool transposed) {
  if (transposed) return {4 * column + row / 2, matrix, row % 2};
  return {4 * row + column / 2, matrix, column % 2};
}

// mma.m16n8k16: A is 16x16, B 16x8, C and D 16x8 in float32.
inline Place place_of_a(int row, int k) {
  return {4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2};
}
inline Place place_of_b(int k, int column) { return {4 * column + k % 8 / 2, k / 8, k % 2}; }
inline Place place_of_d(int row, int column) {
  return {4 * (row % 8) + column / 2, 2 * (row / 8) + column % 2, 0};
}

inline uint32_t bits_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

// Round to nearest, ties to even. A NaN becomes 0x7fff, as cvt makes it.
inline uint16_t to_bf16(float v) {
  if (std::isnan(v)) return 0x7fff;
  const uint32_t u = bits_of(v);
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(uint32_t v) { return float_of(v << 16); }

inline uint16_t to_fp16(float v) {
  if (std::isnan(v)) return 0x7fff;
  const uint16_t sign = bits_of(v) >> 16 & 0x8000;
  const double magnitude = std::fabs(static_cast<double>(v));
  if (magnitude >= 65520.0) return sign | 0x7c00;  // half a step above the largest, 65504
  // In units of the last place; below 2^-14 that is 2^-24, and a carry runs into the exponent.
  int exponent = -14;
  if (magnitude >= 0x1p-14) exponent = std::ilogb(magnitude);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)));
}
inline float from_fp16(uint32_t v) {
  const uint32_t sign = (v & 0x8000) << 16, exponent = v >> 10 & 31, mantissa = v & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

// What the lanes bring to an mma and take from it.
struct Fragments {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

// Exact products, summed in float64, rounded to float32 once.
template <float (*widen)(uint32_t)>
void multiply(Fragments* const* lanes) {
  double a[16][16], b[16][8];
  const auto element = [](const uint32_t* words, const Place& p) {
    return static_cast<double>(widen(words[p.word] >> 16 * p.half & 0xffff));
  };
  for (int k = 0; k < 16; k++) {
    for (int row = 0; row < 16; row++) {
      const Place p = place_of_a(row, k);
      a[row][k] = element(lanes[p.lane]->a, p);
    }
    for (int column = 0; column < 8; column++) {
      const Place p = place_of_b(k, column);
      b[k][column] = element(lanes[p.lane]->b, p);
    }
  }
  for (int row = 0; row < 16; row++) {
    double sums[8];
    for (int column = 0; column < 8; column++) {
      const Place p = place_of_d(row, column);
      sums[column] = lanes[p.lane]->d[p.word];
    }
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; column++) {
      const Place p = place_of_d(row, column);
      lanes[p.lane]->d[p.word] = static_cast<float>(sums[column]);
    }
  }
}

}  // namespace casvit::cuda::emulation
