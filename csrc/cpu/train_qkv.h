// The gradients of the qkv GEMM over a batch.
#pragma once

#include "cpu/train.h"

namespace casvit {

// by_images: one image at a time, right behind the phase that writes its grad_qkv, while that is in
// the cache: call image(i) for each. Then, or without it for everything, finish().
class QkvBackward {
 public:
  QkvBackward(const TrainingProblem&, const float* grad_qkv, const QkvGradients& to,
              bool by_images);
  ~QkvBackward();

  // Where that pays: images that are large and many enough to keep all threads busy.
  static bool goes_by_images(const TrainingProblem&);
  void image(int64_t) const;
  void finish() const;

 private:
  int64_t pixels() const { return p_.images * p_.geometry.pixels(); }
  int64_t rows() const { return 3 * p_.geometry.C; }
  void input(int64_t begin, int64_t end) const;
  void weight(int64_t part, int64_t row, int64_t row_end) const;
  void bias(int64_t unit) const;

  const TrainingProblem& p_;
  const float* grad_;
  const QkvGradients& to_;
  const bool by_images_;
  int64_t part_, parts_;           // pixels of a part, and how many parts
  const float* matrix_ = nullptr;  // the weights, [3C][C]
  char* packed_;
  float* k_scale_;  // [3C, padded], where kernels use it
  float* sums_;     // [parts][3C][C]
  // The gradient of the bias is summed in units of pixels that are cut by the shape alone.
  int64_t units_of_image_;
  double* bias_sums_;  // [images][units of an image][3C]
};

}  // namespace casvit
