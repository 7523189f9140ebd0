// The operators of casvit_kernels on CPU tensors: from torch's stable ABI to plain pointers and
// back. Schemas, fake kernels, autograd and autocast are in casvit_kernels/ops/mixer/schema.py. No
// arithmetic here.
#include "cpu/infer.h"
#include "bindings/tensors.h"
#include "cpu/dispatch.h"

namespace {

using namespace casvit::binding;

casvit::Sources with_running(const casvit::Sources& s) {
  for (const casvit::GateSources& g : s.gate)
    STD_TORCH_CHECK(g.norm_mean.data && g.norm_var.data,
                    "norm_mean, norm_var: expected running statistics, got None");
  return s;
}

Tensor pack(WEIGHT_PARAMETERS, ScalarType dtype) {
  STD_TORCH_CHECK(qkv_weight.dim() == 4, "qkv_weight: expected 4 dimensions, got ",
                  qkv_weight.dim());
  const int64_t C = qkv_weight.size(1);
  const casvit::Sources sources = with_running(casvit::Sources WEIGHT_SOURCES);
  const casvit::Kernels& kernels = casvit::active_kernels();
  const casvit::Precision precision = precision_for(dtype);
  const int64_t bytes[] = {casvit::packed_bytes(kernels, C, precision)};
  Tensor packed = torch::stable::empty({bytes, 1}, ScalarType::Byte);
  casvit::pack(kernels, sources, precision, packed.mutable_data_ptr());
  return packed;
}

void compute(const Tensor& x, const casvit::Sources& sources, const Tensor* packed, Tensor& out) {
  const casvit::Input input = input_of(x, "x");
  if (x.numel() == 0) return;
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const casvit::Kernels& kernels = casvit::active_kernels();
  const casvit::Precision precision = precision_for(out.scalar_type());
  void* weights = packed ? packed->data_ptr() : nullptr;
  if (!weights || !casvit::is_current(kernels, sources, precision, weights, packed->numel())) {
    weights = casvit::scratch_for_packing(casvit::packed_bytes(kernels, C, precision));
    casvit::pack(kernels, sources, precision, weights);
  }
  casvit::infer(kernels, casvit::make_geometry(C, H, W, kernels.lanes),
                casvit::view(kernels, C, precision, weights), precision, input, output_of(out, x),
                B, thread_pool());
}

Tensor project_and_mix(const Tensor& x, WEIGHT_PARAMETERS, const Optional& packed,
                       std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions (B, C, H, W), got ", x.dim());
  STD_TORCH_CHECK(qkv_weight.dim() == 4, "qkv_weight: expected 4 dimensions, got ",
                  qkv_weight.dim());
  const int64_t C = x.size(1);
  STD_TORCH_CHECK(qkv_weight.size(1) == C, "x: expected ", qkv_weight.size(1), " channels, got ",
                  C);
  const casvit::Sources sources = with_running(casvit::Sources WEIGHT_SOURCES);
  Tensor out = empty_output(x, dtype.value_or(x.scalar_type()));
  compute(x, sources, packed ? &*packed : nullptr, out);
  return out;
}

void remember(const Tensor& packed, WEIGHT_PARAMETERS) {
  STD_TORCH_CHECK(qkv_weight.dim() == 4, "qkv_weight: expected 4 dimensions, got ",
                  qkv_weight.dim());
  const int64_t C = qkv_weight.size(1);
  const casvit::Sources sources = casvit::Sources WEIGHT_SOURCES;
  STD_TORCH_CHECK(packed.is_cpu() &&
                      casvit::remember_sources(sources, packed.mutable_data_ptr(), packed.numel()),
                  "packed: expected weights packed on this machine, of ", C, " channels");
}

Tensor infer(const Tensor& x, const Tensor& packed) {
  STD_TORCH_CHECK(x.is_cpu() && packed.is_cpu(), "x, packed: expected CPU tensors");
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions (B, C, H, W), got ", x.dim());
  Tensor out = empty_output(x, x.scalar_type());
  const casvit::Sources* sources =
      casvit::sources_of(casvit::active_kernels(), x.size(1), precision_for(out.scalar_type()),
                         packed.const_data_ptr(), packed.numel());
  STD_TORCH_CHECK(sources, "packed: expected weights packed for x, on this machine");
  compute(x, *sources, &packed, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(casvit_kernels, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("project_and_mix", TORCH_BOX(&project_and_mix));
  m.impl("cpu_remember", TORCH_BOX(&remember));
  m.impl("cpu_infer", TORCH_BOX(&infer));
}
