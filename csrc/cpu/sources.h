// The parameters and buffers of a mixer where they lie in memory, and reading them.
#pragma once

#include "cpu/layout.h"
#include "mixer_weights.h"

namespace casvit {

// A parameter or buffer in its own memory, any strides; data == nullptr: absent.
struct Source {
  const void* data = nullptr;
  DType dtype = DType::F32;
  int64_t stride[4] = {0, 0, 0, 0};
  int64_t span = 0;  // elements from the first to the last in memory
};

// In the order of mixer_weights.h.
#define CASVIT_MEMBER(prefix, field, ...) Source prefix##field;
struct GateSources {
  CASVIT_GATE_WEIGHTS(CASVIT_MEMBER, )
  double eps;
};
struct Sources {
  int64_t C;
  CASVIT_QKV_WEIGHTS(CASVIT_MEMBER)
  GateSources gate[2];  // q, k
  CASVIT_COMBINE_WEIGHTS(CASVIT_MEMBER)
};
#undef CASVIT_MEMBER

// Element [i][j][y][x] as a float.
float at(const Source&, int64_t i, int64_t j = 0, int64_t y = 0, int64_t x = 0);
// Whether a matrix of so many columns is float32 and row-major.
bool is_dense(const Source&, int64_t columns);
// to[i] = s[row][i] of a matrix.
void copy_row(const Source&, int64_t row, int64_t n, float* to);
// A vector as dense floats.
void pack_vector(const Source&, int64_t n, float* to);
// A (rows, columns) matrix as dense floats: where it lies, or copied to `scratch`.
const float* dense_matrix(const Source&, int64_t rows, int64_t columns, float* scratch);

// BatchNorm of a gate: BN(d) = d * scale + (beta - mean * scale), scale = gamma / sqrt(var + eps).
double reciprocal_deviation(const GateSources&, int64_t channel);
double gamma(const GateSources&, int64_t channel);  // 1 if absent
double beta(const GateSources&, int64_t channel);   // 0 if absent
double batch_norm_scale(const GateSources&, int64_t channel);

// A hash of sampled values of all sources.
uint64_t fingerprint(const Sources&);

}  // namespace casvit
