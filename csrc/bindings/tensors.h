// From torch's stable ABI to plain pointers: what all files of operators share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"

namespace casvit::binding {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline casvit::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return casvit::DType::F32;
    case ScalarType::BFloat16: return casvit::DType::BF16;
    case ScalarType::Half: return casvit::DType::F16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got scalar type ",
                      static_cast<int>(t.scalar_type()));
  }
}

inline casvit::Source source(const Tensor& t, const char* name, int64_t numel, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got ", t.numel());
  casvit::Source s;
  s.data = t.const_data_ptr();
  s.dtype = dtype_of(t, name);
  s.span = 1;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  STD_TORCH_CHECK(static_cast<int64_t>(sizes.size()) == dim, name, ": expected ", dim,
                  " dimensions, got ", sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    s.stride[i] = strides[i];
    s.span += (sizes[i] - 1) * strides[i];
  }
  return s;
}
inline casvit::Source source(const Optional& t, const char* name, int64_t numel, int64_t dim) {
  return t ? source(*t, name, numel, dim) : casvit::Source{};
}

#define GATE_PARAMETERS(z)                                              \
  const Tensor &z##_depthwise_weight, const Tensor &z##_depthwise_bias, \
      const Optional &z##_norm_weight, const Optional &z##_norm_bias,   \
      const Optional &z##_norm_mean, const Optional &z##_norm_var,      \
      const Tensor &z##_spatial_weight, const Tensor &z##_channel_weight
#define WEIGHT_PARAMETERS                                                                     \
  const Tensor &qkv_weight, const Optional &qkv_bias, GATE_PARAMETERS(q), GATE_PARAMETERS(k), \
      const Tensor &dwc_weight, const Tensor &dwc_bias, const Tensor &proj_weight,            \
      const Tensor &proj_bias, double eps_q, double eps_k
#define GATE_SOURCES(z, eps)                                       \
  {source(z##_depthwise_weight, #z "_depthwise_weight", 9 * C, 4), \
   source(z##_depthwise_bias, #z "_depthwise_bias", C, 1),         \
   source(z##_norm_weight, #z "_norm_weight", C, 1),               \
   source(z##_norm_bias, #z "_norm_bias", C, 1),                   \
   source(z##_norm_mean, #z "_norm_mean", C, 1),                   \
   source(z##_norm_var, #z "_norm_var", C, 1),                     \
   source(z##_spatial_weight, #z "_spatial_weight", C, 4),         \
   source(z##_channel_weight, #z "_channel_weight", C * C, 4),     \
   eps}
#define WEIGHT_SOURCES                               \
  {C,                                                \
   source(qkv_weight, "qkv_weight", 3 * C * C, 4),   \
   source(qkv_bias, "qkv_bias", 3 * C, 1),           \
   {GATE_SOURCES(q, eps_q), GATE_SOURCES(k, eps_k)}, \
   source(dwc_weight, "dwc_weight", 9 * C, 4),       \
   source(dwc_bias, "dwc_bias", C, 1),               \
   source(proj_weight, "proj_weight", 9 * C, 4),     \
   source(proj_bias, "proj_bias", C, 1)}

inline casvit::Precision precision_for(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? casvit::Precision::BF16 : casvit::Precision::F32;
}

inline casvit::Input input_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions (B, C, H, W), got ", t.dim());
  const auto strides = t.strides();
  return {t.numel() ? t.const_data_ptr() : nullptr,
          dtype_of(t, name),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

// As ops.output_memory_format: channels last when channels are innermost, else contiguous.
inline bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.strides()[1] == 1; }
inline Tensor empty_output(const Tensor& x, ScalarType dtype) {
  return torch::stable::empty(
      x.sizes(), dtype, std::nullopt, std::nullopt, std::nullopt,
      is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}
inline casvit::Output output_of(Tensor& out, const Tensor& x) {
  return {out.mutable_data_ptr(), dtype_of(out, "dtype"), is_channels_last(x)};
}

inline casvit::ThreadPool thread_pool() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t count, void (*task)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context, i);
            });
          }};
}

}  // namespace casvit::binding
