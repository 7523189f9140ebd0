// The mixer's operators on CUDA tensors: from torch's stable ABI to plain pointers and back. The
// qkv product is the library's.
#include "bindings/cuda_call.h"

namespace {

using namespace casvit::binding;
namespace cuda = casvit::cuda;

Tensor pack(WEIGHT_PARAMETERS, const Optional& statistics, ScalarType dtype) {
  const int64_t C = dwc_bias.numel();
  Kept kept;
  const cuda::Weights weights = weights_of(kept, WEIGHT_NAMES);
  const torch::stable::accelerator::DeviceGuard guard(dwc_bias.get_device_index());
  const cuda::Problem p = problem(dwc_bias, {1, C, 1, 1}, dtype);
  Tensor packed = floats<2>(dwc_bias, {cuda::packed_words(p.channels), 4});
  const float eps[2] = {static_cast<float>(eps_q), static_cast<float>(eps_k)};
  const float* of = statistics ? floats_of(*statistics, "statistics", 4 * C, dwc_bias) : nullptr;
  check(cuda::pack(p, weights, of, eps, packed.mutable_data_ptr()));
  return packed;
}

Tensor statistics(const Tensor& qkv, const Tensor& packed,
                  torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  const std::array<int64_t, 4> shape = shape_of(sizes);
  check_inputs(qkv, packed, shape, cuda::packed_words(static_cast<int>(shape[1])));
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const cuda::Problem p = problem(qkv, shape, qkv.scalar_type());
  cuda::Parts parts;
  check(cuda::parts(p, &parts));
  Tensor counts = floats<1>(packed, {parts.moments});
  Tensor moments = floats<4>(packed, {parts.moments, 2, 2, padded(shape[1])});
  Tensor result = floats<3>(packed, {2, 2, shape[1]});
  check(cuda::statistics(p, qkv.const_data_ptr(), packed.const_data_ptr(),
                         static_cast<float*>(counts.mutable_data_ptr()),
                         static_cast<float*>(moments.mutable_data_ptr()),
                         static_cast<float*>(result.mutable_data_ptr())));
  return result;
}

struct Mixed {
  Tensor out;
  Optional spatial, pooled, channel;
};

Mixed run_mix(const Tensor& qkv, const Tensor& packed, const std::array<int64_t, 4>& shape,
              bool channels_last, bool training) {
  check_inputs(qkv, packed, shape, cuda::packed_words(static_cast<int>(shape[1])));
  const auto [B, C, H, W] = shape;
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const cuda::Problem p = problem(qkv, shape, qkv.scalar_type());
  const bool single_pass = cuda::is_single_pass(p);
  Optional sums;
  if (!single_pass) {
    cuda::Parts parts;
    check(cuda::parts(p, &parts));
    sums = floats<4>(packed, {parts.sums, 2, B, padded(C)});
  }
  Mixed m{torch::stable::empty(
              {shape.data(), 4}, qkv.scalar_type(), std::nullopt, qkv.device(), std::nullopt,
              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous),
          std::nullopt, std::nullopt, std::nullopt};
  if (training || !single_pass) m.spatial = floats<4>(packed, {B, 2, H, W});
  float *pooled = nullptr, *channel = nullptr;
  if (training) {
    m.pooled = floats<3>(packed, {2, B, C});
    m.channel = floats<3>(packed, {2, B, C});
    pooled = static_cast<float*>(m.pooled->mutable_data_ptr());
    channel = static_cast<float*>(m.channel->mutable_data_ptr());
  }
  check(cuda::mix(p, qkv.const_data_ptr(), packed.const_data_ptr(), sums ? data(*sums) : nullptr,
                  m.spatial ? data(*m.spatial) : nullptr, pooled, channel, m.out.mutable_data_ptr(),
                  channels_last));
  return m;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix(const Tensor& qkv, const Tensor& packed,
                                               torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                               bool channels_last) {
  Mixed m = run_mix(qkv, packed, shape_of(sizes), channels_last, true);
  return {m.out, *m.spatial, *m.pooled, *m.channel};
}

// The product by the library, channels innermost whatever x's layout is: either is a plain GEMM.
Tensor project(const Tensor& x, const Tensor& weight, const Optional& bias) {
  const Tensor cast =
      x.scalar_type() == weight.scalar_type() ? x : torch::stable::to(x, weight.scalar_type());
  Tensor rows;
  if (bias || is_channels_last(cast)) {  // linear of a transposed view adds a bias after rounding
    const Tensor pixels = torch::stable::transpose(torch::stable::transpose(cast, 1, 2), 2, 3);
    rows = torch::stable::contiguous(pixels);
  } else {
    const int64_t maps[] = {x.size(0), x.size(1), x.size(2) * x.size(3)};
    rows = torch::stable::transpose(
        torch::stable::reshape(torch::stable::contiguous(cast), {maps, 3}), 1, 2);
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(rows),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) ==
                      AOTI_TORCH_SUCCESS,
                  "the qkv product, by the library, failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x to out with the statistics that were packed.
Tensor infer(const Tensor& x, const Tensor& qkv_weight, const Optional& qkv_bias,
             const Tensor& packed) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4,
                  "x: expected a CUDA tensor of 4 dimensions (B, C, H, W), got ", described(x));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const std::array<int64_t, 4> shape = shape_of(x.sizes());
  if (x.numel() == 0)
    return torch::stable::empty(
        x.sizes(), qkv_weight.scalar_type(), std::nullopt, x.device(), std::nullopt,
        is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  return run_mix(project(x, qkv_weight, qkv_bias), packed, shape, is_channels_last(x), false).out;
}

}  // namespace

// Whether the current stream can be found: asked before any call, through ctypes.
extern "C" __attribute__((visibility("default"))) int casvit_cuda_streams() {
  return stream_getter() != nullptr;
}

STABLE_TORCH_LIBRARY_IMPL(casvit_kernels, CUDA, m) {
  m.impl("cuda_pack", TORCH_BOX(&pack));
  m.impl("cuda_statistics", TORCH_BOX(&statistics));
  m.impl("cuda_mix", TORCH_BOX(&mix));
  m.impl("cuda_infer", TORCH_BOX(&infer));
}
