// Where the arrays of packed weights begin, and filling them: what packing for inference (pack.cpp)
// and packing for training (pack_train.cpp) share.
#pragma once

#include "cpu/kernels.h"
#include "cpu/sources.h"
#include "cpu/thread_pool.h"

namespace casvit {

constexpr int64_t aligned(int64_t bytes) { return divide_up(bytes, 64) * 64; }

inline float* floats(void* base, int64_t offset) {
  return reinterpret_cast<float*>(static_cast<char*>(base) + offset);
}

// Offsets in bytes of the weights of the qkv GEMM.
struct QkvLayout {
  int64_t weight, k_scale, matrix, bias, end;
  // kept: with the dense matrix, for packed weights that outlive the call (see
  // WeightsView::matrix).
  QkvLayout(const Kernels&, int64_t C, Precision, int64_t begin, bool kept);
};
// `base`: zeros where the bias goes. Returns the dense matrix.
const float* fill_qkv(const Kernels&, int64_t C, const Source& weight, const Source& bias,
                      Precision, const QkvLayout&, void* base, const ThreadPool&);
void view_qkv(const QkvLayout&, const void* packed, WeightsView&);

// Offsets in bytes of everything else.
struct MixingLayout {
  struct Gate {
    int64_t depthwise, depthwise_bias, spatial, channel;
  };
  Gate gate[2];
  int64_t dwc, dwc_bias, proj, proj_bias, end;
  MixingLayout(const Kernels&, int64_t C, int64_t begin);
};
// `base`: zeros.
void fill_mixing(const Kernels&, const Sources&, const MixingLayout&, void* base,
                 const ThreadPool&);
void fill_combine(const Kernels&, const Sources&, const MixingLayout&, void* base);
WeightsView view_mixing(const MixingLayout&, const void* packed);

// A depthwise convolution, [C, 1, 3, 3] and [C], to [blocks][9][lanes] and [padded]: weights times
// scale(c), the bias times that plus shift(c, scale).
template <class Scale, class Shift>
void pack_depthwise(const Source& weight, const Source& bias, int64_t C, int64_t lanes, float* taps,
                    float* biases, Scale scale, Shift shift) {
  const int64_t* stride = weight.stride;
  const bool dense =
      weight.dtype == DType::F32 && stride[0] == 9 && stride[2] == 3 && stride[3] == 1;
  float copy[9];
  for (int64_t c = 0; c < C; ++c) {
    const double factor = scale(c);
    float* to = taps + c / lanes * 9 * lanes + c % lanes;
    const float* own = dense ? static_cast<const float*>(weight.data) + c * 9 : copy;
    for (int64_t t = 0; t < 9 && !dense; ++t) copy[t] = at(weight, c, 0, t / 3, t % 3);
    for (int64_t t = 0; t < 9; ++t)
      to[t * lanes] = static_cast<float>(static_cast<double>(own[t]) * factor);
    biases[c] = static_cast<float>(at(bias, c) * factor + shift(c, factor));
  }
}
inline double unscaled(int64_t) { return 1.0; }
inline double unshifted(int64_t, double) { return 0.0; }

}  // namespace casvit
