// What the operators of training share: shapes, and float32 results and operands.
#pragma once

#include <cstring>
#include <initializer_list>
#include <vector>

#include "bindings/tensors.h"
#include "cpu/dispatch.h"
#include "cpu/train.h"

namespace casvit::binding {

using torch::headeronly::IntHeaderOnlyArrayRef;

// What every phase starts from; in a map without pixels there is nothing to do.
struct Shape {
  int64_t B, C, H, W;
  bool empty() const { return B * C * H * W == 0; }
  casvit::TrainingProblem problem() const {
    return {casvit::active_kernels(), B, C, H, W, thread_pool()};
  }
};
inline Shape shape_of(IntHeaderOnlyArrayRef sizes, const Tensor& qkv_weight) {
  STD_TORCH_CHECK(sizes.size() == 4, "shape: expected 4 sizes (B, C, H, W), got ", sizes.size());
  STD_TORCH_CHECK(qkv_weight.dim() == 4, "qkv_weight: expected 4 dimensions, got ",
                  qkv_weight.dim());
  for (size_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(sizes[i] >= 0, "shape: expected no negative size, got ", sizes[i]);
  STD_TORCH_CHECK(sizes[1] == qkv_weight.size(1), "shape: expected ", qkv_weight.size(1),
                  " channels, got ", sizes[1]);
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

using Sizes = std::initializer_list<int64_t>;

// Results of phases are float32 whatever the dtype of x.
inline Tensor empty(Sizes sizes) {
  const std::vector<int64_t> list(sizes);
  return torch::stable::empty(list, ScalarType::Float);
}
inline Tensor zeros(Sizes sizes) {
  Tensor t = empty(sizes);
  if (t.numel()) std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(t.numel()) * 4);
  return t;
}
inline float* write(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline void check_floats(const Tensor& t, const char* name, int64_t numel) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name,
                  ": expected float32, got scalar type ", static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got ", t.numel());
}
inline const float* read(const Tensor& t, const char* name, int64_t numel) {
  check_floats(t, name, numel);
  return static_cast<const float*>(t.const_data_ptr());
}

// The sources with `statistics` (2, 2, C) in place of the running ones.
inline casvit::Sources with_statistics(casvit::Sources s, const Tensor& statistics) {
  const float* from = read(statistics, "statistics", 4 * s.C);
  for (int i = 0; i < 2; ++i) {
    casvit::Source mean;
    mean.data = from + 2 * i * s.C;
    mean.stride[0] = 1;
    mean.span = s.C;
    casvit::Source var = mean;
    var.data = from + (2 * i + 1) * s.C;
    s.gate[i].norm_mean = mean;
    s.gate[i].norm_var = var;
  }
  return s;
}

}  // namespace casvit::binding
