// From torch's stable ABI to plain pointers: what all files of operators share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "cpu/huge_pages.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"
#include "mixer_weights.h"

namespace casvit::binding {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Required = Tensor;
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

// Parameters of an operator for the weights of a mixer, and the sources of these.
#define CASVIT_PARAMETER(prefix, field, presence, ...) \
  [[maybe_unused]] const presence &prefix##field,
#define CASVIT_SOURCE(prefix, field, presence, elements, dimensions) \
  source(prefix##field, #prefix #field, elements, dimensions),
#define WEIGHT_PARAMETERS                \
  CASVIT_MIXER_WEIGHTS(CASVIT_PARAMETER) \
  [[maybe_unused]] double eps_q, [[maybe_unused]] double eps_k
#define WEIGHT_SOURCES                                                                \
  {C,                                                                                 \
   CASVIT_QKV_WEIGHTS(CASVIT_SOURCE){{CASVIT_GATE_WEIGHTS(CASVIT_SOURCE, q_) eps_q},  \
                                     {CASVIT_GATE_WEIGHTS(CASVIT_SOURCE, k_) eps_k}}, \
   CASVIT_COMBINE_WEIGHTS(CASVIT_SOURCE)}

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
  Tensor out = torch::stable::empty(
      x.sizes(), dtype, std::nullopt, std::nullopt, std::nullopt,
      is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  // Large tensors are new memory in each call: what faults is most of their cost.
  const int64_t each = dtype == ScalarType::Float ? 4 : 2;
  casvit::wish_huge_pages(out.mutable_data_ptr(), out.numel() * each);
  return out;
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
          },
          [](int64_t count, void (*task)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(
                0, count, 1, [&](int64_t begin, int64_t end) { task(context, begin, end); });
          }};
}

}  // namespace casvit::binding
