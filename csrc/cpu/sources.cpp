#include "cpu/sources.h"

#include <cmath>
#include <cstring>

namespace casvit {
namespace {

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float magnitude;
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  else if (exponent == 0) magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  else magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

float value(const Source& s, int64_t offset) {
  if (s.dtype == DType::F32) return static_cast<const float*>(s.data)[offset];
  const uint16_t bits = static_cast<const uint16_t*>(s.data)[offset];
  if (s.dtype == DType::F16) return half_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}

}  // namespace

float at(const Source& s, int64_t i, int64_t j, int64_t y, int64_t x) {
  return value(s, i * s.stride[0] + j * s.stride[1] + y * s.stride[2] + x * s.stride[3]);
}

bool is_dense(const Source& s, int64_t columns) {
  return s.dtype == DType::F32 && s.stride[0] == columns && s.stride[1] == 1;
}
void copy_row(const Source& s, int64_t row, int64_t n, float* to) {
  if (s.dtype == DType::F32 && s.stride[1] == 1) {
    std::memcpy(to, static_cast<const float*>(s.data) + row * s.stride[0],
                sizeof(float) * static_cast<size_t>(n));
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = at(s, row, i);
}

void pack_vector(const Source& s, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = at(s, i);
}
const float* dense_matrix(const Source& s, int64_t rows, int64_t columns, float* scratch) {
  if (is_dense(s, columns)) return static_cast<const float*>(s.data);
  for (int64_t row = 0; row < rows; ++row) copy_row(s, row, columns, scratch + row * columns);
  return scratch;
}

double reciprocal_deviation(const GateSources& g, int64_t c) {
  return 1.0 / std::sqrt(static_cast<double>(at(g.norm_var, c)) + g.eps);
}
double gamma(const GateSources& g, int64_t c) {
  return g.norm_weight.data ? at(g.norm_weight, c) : 1.0;
}
double beta(const GateSources& g, int64_t c) { return g.norm_bias.data ? at(g.norm_bias, c) : 0.0; }
double batch_norm_scale(const GateSources& g, int64_t c) {
  return gamma(g, c) * reciprocal_deviation(g, c);
}

}  // namespace casvit
