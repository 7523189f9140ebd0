// The backward's operators on CUDA tensors; see kernels.Phases in Python for what each is.
#include "bindings/cuda_call.h"

namespace {

using namespace casvit::binding;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::accelerator::DeviceGuard;
namespace cuda = casvit::cuda;

bool backward_fits(const Tensor& like, Sizes sizes) {
  const DeviceGuard guard(like.get_device_index());
  cuda::BackwardParts parts;
  return cuda::backward_parts(problem(like, shape_of(sizes), ScalarType::BFloat16), &parts) ==
         nullptr;
}

Tensor pack_backward(WEIGHT_PARAMETERS, const Optional& statistics, ScalarType dtype) {
  const int64_t C = dwc_bias.numel();
  Kept kept;
  const cuda::Weights weights = weights_of(kept, WEIGHT_NAMES);
  const DeviceGuard guard(dwc_bias.get_device_index());
  const cuda::Problem p = problem(dwc_bias, {1, C, 1, 1}, dtype);
  Tensor packed = floats<2>(dwc_bias, {cuda::backward_packed_words(p.channels), 4});
  const float eps[2] = {static_cast<float>(eps_q), static_cast<float>(eps_k)};
  const float* of = statistics ? floats_of(*statistics, "statistics", 4 * C, dwc_bias) : nullptr;
  check(cuda::pack_backward(p, weights, of, eps, packed.mutable_data_ptr()));
  return packed;
}

// A call on qkv, with what all three passes check.
struct Call {
  DeviceGuard guard;
  std::array<int64_t, 4> shape;
  cuda::Problem p;
  cuda::BackwardParts parts;
  Call(const Tensor& qkv, const Tensor& packed, Sizes sizes)
      : guard(qkv.get_device_index()),
        shape(shape_of(sizes)),
        p(problem(qkv, shape, qkv.scalar_type())) {
    check_inputs(qkv, packed, shape, cuda::backward_packed_words(p.channels));
    check(cuda::backward_parts(p, &parts));
  }
  int64_t pixels() const { return shape[0] * shape[2] * shape[3]; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> combine(const Tensor& qkv, const Tensor& packed,
                                                           const Tensor& spatial,
                                                           const Tensor& channel,
                                                           const Tensor& grad, Sizes sizes) {
  const Call c(qkv, packed, sizes);
  const auto [B, C, H, W] = c.shape;
  const int64_t P = padded(C), maps[] = {B, H, W, P}, all[] = {B, H, W, 3 * P};
  check_rows(grad, "grad", c.pixels() * P, qkv);
  Tensor grad_qkv = torch::stable::new_empty(qkv, {all, 4}, qkv.scalar_type());
  Tensor grad_sum = torch::stable::new_empty(qkv, {maps, 4}, qkv.scalar_type());
  Tensor pixel = floats<5>(packed, {c.parts.slices, B, 2, H, W});
  Tensor sums = floats<4>(packed, {c.parts.bands, 2, B, P});
  Tensor weights = floats<3>(packed, {c.parts.combine_blocks, 20, P});
  check(cuda::backward_combine(c.p, qkv.const_data_ptr(), packed.const_data_ptr(),
                               floats_of(spatial, "spatial", 2 * c.pixels(), qkv),
                               floats_of(channel, "channel", 2 * B * C, qkv), grad.const_data_ptr(),
                               grad_qkv.mutable_data_ptr(), grad_sum.mutable_data_ptr(),
                               data(pixel), data(sums), data(weights)));
  return {grad_qkv, grad_sum, pixel, sums, weights};
}

std::tuple<Tensor, Tensor> gate(const Tensor& qkv, const Tensor& packed, const Tensor& spatial,
                                const Tensor& pixel, const Tensor& shift, Sizes sizes) {
  const Call c(qkv, packed, sizes);
  const auto [B, C, H, W] = c.shape;
  Tensor logit = floats<4>(packed, {B, 2, H, W});
  Tensor sums = floats<4>(packed, {c.parts.gate_blocks, 2, 2, padded(C)});
  check(cuda::backward_gate(c.p, qkv.const_data_ptr(), packed.const_data_ptr(),
                            floats_of(spatial, "spatial", 2 * c.pixels(), qkv),
                            floats_of(pixel, "pixel", 2 * c.pixels(), qkv),
                            floats_of(shift, "shift", 2 * B * C, qkv), data(logit), data(sums)));
  return {logit, sums};
}

Tensor depthwise(const Tensor& qkv, const Tensor& packed, const Tensor& spatial,
                 const Tensor& logit, const Tensor& channel, const Tensor& shift,
                 const Tensor& coefficients, const Tensor& grad_sum, Tensor grad_qkv, Sizes sizes) {
  const Call c(qkv, packed, sizes);
  const auto [B, C, H, W] = c.shape;
  check_rows(grad_sum, "grad_sum", c.pixels() * padded(C), qkv);
  check_rows(grad_qkv, "grad_qkv", c.pixels() * 3 * padded(C), qkv);
  Tensor weights = floats<4>(packed, {c.parts.depthwise_blocks, 2, 10, padded(C)});
  check(cuda::backward_depthwise(
      c.p, qkv.const_data_ptr(), packed.const_data_ptr(),
      floats_of(spatial, "spatial", 2 * c.pixels(), qkv),
      floats_of(logit, "logit", 2 * c.pixels(), qkv), floats_of(channel, "channel", 2 * B * C, qkv),
      floats_of(shift, "shift", 2 * B * C, qkv),
      floats_of(coefficients, "coefficients", 6 * C, qkv), grad_sum.const_data_ptr(),
      grad_qkv.mutable_data_ptr(), data(weights)));
  return weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(casvit_kernels, CUDA, m) {
  m.impl("cuda_backward_fits", TORCH_BOX(&backward_fits));
  m.impl("cuda_pack_backward", TORCH_BOX(&pack_backward));
  m.impl("cuda_backward_combine", TORCH_BOX(&combine));
  m.impl("cuda_backward_gate", TORCH_BOX(&gate));
  m.impl("cuda_backward_depthwise", TORCH_BOX(&depthwise));
}
