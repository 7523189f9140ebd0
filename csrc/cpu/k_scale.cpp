#include "cpu/k_scale.h"

#include <cstring>

namespace casvit {
namespace {
// The bits of |a|. They order as magnitudes do, and code for any CPU compares integers faster.
int32_t magnitude(float a) {
  int32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits & 0x7fffffff;
}
// Back to a float, clamped to [2^-60, 2^60].
float clamped(int32_t bits) {
  constexpr int32_t one = 127 << 23, far = 60 << 23;
  if (bits >= 255 << 23) bits = one;  // infinity or NaN
  bits = bits < one - far ? one - far : bits > one + far ? one + far : bits;
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
}  // namespace

void column_maxima(const float* matrix, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                   float* to) {
  const int64_t stop = end < columns ? end : columns;
  int32_t top[64] = {};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = begin; c < stop; ++c) {
      const int32_t a = magnitude(matrix[row * columns + c]);
      top[c - begin] = a > top[c - begin] ? a : top[c - begin];
    }
  for (int64_t c = begin; c < end; ++c) to[c] = clamped(top[c - begin]);
}
void row_maxima(const float* matrix, int64_t columns, int64_t begin, int64_t end, float* to) {
  for (int64_t row = begin; row < end; ++row) {
    int32_t top = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const int32_t a = magnitude(matrix[row * columns + c]);
      top = a > top ? a : top;
    }
    to[row] = clamped(top);
  }
}

}  // namespace casvit
