// The phases of training over a batch: threads, scratch memory, and merging of partial sums. The
// formulas are those of tests/phases.py. Results do not depend on the number of threads, with two
// exceptions in the last bits: the gradient of the qkv weights, and, on AMX, the qkv GEMM and the
// gradient of x where some values do not fit fixed point (amx/int8x3_operands.h).
//
// Between phases, in arrays of the caller: qkv, [images][q, k, v][blocks] planes; gradients at q, k
// and v, [images][pixels][3 C]; the gradient at q2 + k2, [images][blocks][pixels][lanes]; maps of
// one channel, [images][2][pixels]; vectors, [2][images][C]. All float32.
#pragma once

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"

namespace casvit {

struct TrainingProblem {
  const Kernels& kernels;
  Geometry geometry;
  int64_t images;
  ThreadPool pool;

  TrainingProblem(const Kernels&, int64_t images, int64_t C, int64_t H, int64_t W,
                  const ThreadPool&);
  int64_t image_floats() const { return 3 * geometry.blocks * geometry.plane; }
  int64_t qkv_floats() const { return images * image_floats(); }
  int64_t grad_sum_floats() const {
    return images * geometry.blocks * geometry.pixels() * geometry.lanes;
  }
};

void project(const TrainingProblem&, const WeightsView&, Precision, const Input& x, float* qkv);

// moments: [2][mean, biased variance][C]
void statistics(const TrainingProblem&, const TrainingGates&, const float* qkv, float* moments);

void mix(const TrainingProblem&, const WeightsView&, const float* qkv, const Output&,
         float* spatial, float* pooled, float* channel);

struct CombineGradients {
  float *grad_qkv, *grad_sum;
  float* pixel;                                            // [images][2][pixels]
  float* channel;                                          // [2][images][C]
  float *dwc_weight, *dwc_bias, *proj_weight, *proj_bias;  // [C][9], [C]
};
void backward_combine(const TrainingProblem&, const WeightsView&, const Input& grad,
                      const float* qkv, const float* spatial, const float* channel,
                      const CombineGradients&);

// From the sums of ga z s to the gradients at the pooled means, divided by the pixels, and of the
// channel gates' weights. sum, pooled, channel, shift: [2][images][C]; grad_weight: [C][C] or null.
void backward_channel_gate(const TrainingProblem&, const Sources&, const float* sum,
                           const float* pooled, const float* channel, float* shift,
                           float* const (&grad_weight)[2]);

struct GateGradients {
  float* logit;              // [images][2][pixels]
  float* spatial_weight[2];  // [C]
  float* sums;               // [2][gn, gn n^][C]
};
void backward_gate(const TrainingProblem&, const TrainingGates&, const float* qkv,
                   const float* spatial, const float* pixel, const float* shift,
                   const GateGradients&);

// to: [2][3][C]; the gradient at d is c0 gn + c1 + c2 n^. batch: whether a gate uses batch
// statistics; sums as in GateGradients.
void coefficients(const TrainingProblem&, const Sources&, const float* sums, const bool (&batch)[2],
                  float* to);

// The gradients of the qkv GEMM, from what the phases leave in grad_qkv.
struct QkvGradients {
  const Source* weight;  // (3C, C)
  Precision precision;
  const Input* x;
  const Output* grad_x;  // or null
  float* grad_weight;    // [3C][C], or null
  float* grad_bias;      // [3C], or null
};
void qkv_backward(const TrainingProblem&, const float* grad_qkv, const QkvGradients&);

struct DepthwiseGradients {
  float* grad_qkv;
  float *weight[2], *bias[2];  // [C][9], [C]
};
// With `qkv_gradients`, also the gradients of the qkv GEMM: image by image where images are large,
// while their grad_qkv is in the cache.
void backward_depthwise(const TrainingProblem&, const TrainingGates&, const float* qkv,
                        const float* spatial, const float* channel, const float* shift,
                        const float* logit, const float* coefficients, const float* grad_sum,
                        const DepthwiseGradients&, const QkvGradients* qkv_gradients = nullptr);

}  // namespace casvit
