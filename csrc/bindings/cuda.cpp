// The mixer's operators on CUDA tensors: from torch's stable ABI to plain pointers and back. The
// qkv product is the library's. Needs neither CUDA's headers nor libtorch_cuda: the current
// stream's getter is looked up where the process has it.
#include "cuda/mixer.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <map>
#include <mutex>
#include <vector>

#include "bindings/tensors.h"
#include "cuda/weights.h"

namespace {

using namespace casvit::binding;
namespace cuda = casvit::cuda;

void check(const char* wrong) { STD_TORCH_CHECK(!wrong, "CUDA kernels: ", wrong); }

// Of a library that the process has loaded. Python loads torch's with RTLD_LOCAL, so that the
// global scope has none of them, and this library's own scope has libtorch_cpu alone.
void* loaded_symbol(const char* library, const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

using StreamGetter = AOTITorchError (*)(int32_t, void**);

StreamGetter stream_getter() {
  static const auto getter = reinterpret_cast<StreamGetter>(
      loaded_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  return getter;
}

void* current_stream(int device) {
  const StreamGetter getter = stream_getter();
  STD_TORCH_CHECK(getter, "CUDA kernels: this PyTorch has no CUDA streams");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

cuda::Problem problem(const Tensor& like, const std::array<int64_t, 4>& shape, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dtype: expected bfloat16 or float16");
  static std::mutex mutex;
  static std::map<int, cuda::Problem> devices;
  const int device = like.get_device_index();
  cuda::Problem p;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = devices.find(device);
    if (found == devices.end()) {
      check(cuda::look_at_device(device, &p));
      devices[device] = p;
    } else {
      p = found->second;
    }
  }
  for (const int64_t size : shape)
    STD_TORCH_CHECK(size >= 0 && size < (int64_t{1} << 31),
                    "shape: expected sizes below 2^31, got ", size);
  p.images = static_cast<int>(shape[0]);
  p.channels = static_cast<int>(shape[1]);
  p.height = static_cast<int>(shape[2]);
  p.width = static_cast<int>(shape[3]);
  p.float16 = dtype == ScalarType::Half;
  p.stream = current_stream(device);
  return p;
}

std::array<int64_t, 4> shape_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  STD_TORCH_CHECK(sizes.size() == 4, "shape: expected (B, C, H, W), got ", sizes.size(),
                  " dimensions");
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

int64_t padded(int64_t channels) { return (channels + 3) / 4 * 4; }

template <size_t N>
Tensor floats(const Tensor& like, const std::array<int64_t, N>& sizes) {
  return torch::stable::new_empty(like, {sizes.data(), N}, ScalarType::Float);
}

// Keeps contiguous copies of weights alive while pointers to them are used.
class Kept {
 public:
  cuda::Weight weight(const Tensor& t, const char* name, int64_t numel) {
    STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
    STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got ", t.numel());
    tensors_.push_back(torch::stable::contiguous(t));
    const casvit::DType dtype = dtype_of(t, name);
    const int code = dtype == casvit::DType::F32 ? 0 : dtype == casvit::DType::BF16 ? 1 : 2;
    return {tensors_.back().const_data_ptr(), code};
  }
  cuda::Weight weight(const Optional& t, const char* name, int64_t numel) {
    return t ? weight(*t, name, numel) : cuda::Weight{nullptr, 0};
  }

 private:
  std::vector<Tensor> tensors_;
};

#define KEPT(name, numel) kept.weight(name, #name, numel)

Tensor pack(WEIGHT_PARAMETERS, const Optional& statistics, ScalarType dtype) {
  const int64_t C = dwc_bias.numel();
  Kept kept;
  const auto gate = [&](const Tensor& depthwise, const Tensor& bias, const Optional& norm_weight,
                        const Optional& norm_bias, const Tensor& spatial, const Tensor& channel) {
    return cuda::GateWeights{KEPT(depthwise, 9 * C), KEPT(bias, C),    KEPT(norm_weight, C),
                             KEPT(norm_bias, C),     KEPT(spatial, C), KEPT(channel, C * C)};
  };
  const cuda::Weights weights{{gate(q_depthwise_weight, q_depthwise_bias, q_norm_weight,
                                    q_norm_bias, q_spatial_weight, q_channel_weight),
                               gate(k_depthwise_weight, k_depthwise_bias, k_norm_weight,
                                    k_norm_bias, k_spatial_weight, k_channel_weight)},
                              KEPT(dwc_weight, 9 * C),
                              KEPT(dwc_bias, C),
                              KEPT(proj_weight, 9 * C),
                              KEPT(proj_bias, C)};
  const torch::stable::accelerator::DeviceGuard guard(dwc_bias.get_device_index());
  const cuda::Problem p = problem(dwc_bias, {1, C, 1, 1}, dtype);
  Tensor packed = floats<2>(dwc_bias, {cuda::packed_words(p.channels), 4});
  const float eps[2] = {static_cast<float>(eps_q), static_cast<float>(eps_k)};
  const float* of = nullptr;
  if (statistics) {
    STD_TORCH_CHECK(
        statistics->is_cuda() && statistics->is_contiguous() && statistics->numel() == 4 * C &&
            statistics->scalar_type() == ScalarType::Float,
        "statistics: expected a contiguous float32 CUDA tensor of shape (2, 2, ", C, ")");
    of = static_cast<const float*>(statistics->const_data_ptr());
  }
  check(cuda::pack(p, weights, of, eps, packed.mutable_data_ptr()));
  return packed;
}

void check_inputs(const Tensor& qkv, const Tensor& packed, const std::array<int64_t, 4>& shape) {
  const auto [B, C, H, W] = shape;
  STD_TORCH_CHECK(qkv.is_cuda() && qkv.is_contiguous() && qkv.numel() == B * H * W * 3 * padded(C),
                  "qkv: expected a contiguous CUDA tensor of ", B * H * W, " pixels x ",
                  3 * padded(C), " channels");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(qkv.const_data_ptr()) % 16 == 0,
                  "qkv: expected 16-byte alignment");
  STD_TORCH_CHECK(packed.is_cuda() && packed.is_contiguous() &&
                      packed.get_device_index() == qkv.get_device_index() &&
                      packed.numel() == 4 * cuda::packed_words(static_cast<int>(C)),
                  "packed: expected weights packed for ", C, " channels on qkv's device");
}

Tensor statistics(const Tensor& qkv, const Tensor& packed,
                  torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  const std::array<int64_t, 4> shape = shape_of(sizes);
  check_inputs(qkv, packed, shape);
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
  Tensor out, spatial;
  Optional pooled, channel;
};

Mixed run_mix(const Tensor& qkv, const Tensor& packed, const std::array<int64_t, 4>& shape,
              bool channels_last, bool training) {
  check_inputs(qkv, packed, shape);
  const auto [B, C, H, W] = shape;
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  const cuda::Problem p = problem(qkv, shape, qkv.scalar_type());
  cuda::Parts parts;
  check(cuda::parts(p, &parts));
  Tensor sums = floats<4>(packed, {parts.sums, 2, B, padded(C)});
  Mixed m{torch::stable::empty(
              {shape.data(), 4}, qkv.scalar_type(), std::nullopt, qkv.device(), std::nullopt,
              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous),
          floats<4>(packed, {B, 2, H, W}), std::nullopt, std::nullopt};
  float *pooled = nullptr, *channel = nullptr;
  if (training) {
    m.pooled = floats<3>(packed, {2, B, C});
    m.channel = floats<3>(packed, {2, B, C});
    pooled = static_cast<float*>(m.pooled->mutable_data_ptr());
    channel = static_cast<float*>(m.channel->mutable_data_ptr());
  }
  check(cuda::mix(p, qkv.const_data_ptr(), packed.const_data_ptr(),
                  static_cast<float*>(sums.mutable_data_ptr()),
                  static_cast<float*>(m.spatial.mutable_data_ptr()), pooled, channel,
                  m.out.mutable_data_ptr(), channels_last));
  return m;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix(const Tensor& qkv, const Tensor& packed,
                                               torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                               bool channels_last) {
  Mixed m = run_mix(qkv, packed, shape_of(sizes), channels_last, true);
  return {m.out, m.spatial, *m.pooled, *m.channel};
}

// The product by the library, channels innermost whatever x's layout is: either is a plain GEMM.
Tensor project(const Tensor& x, const Tensor& weight, const Optional& bias) {
  const Tensor cast =
      x.scalar_type() == weight.scalar_type() ? x : torch::stable::to(x, weight.scalar_type());
  Tensor rows;
  if (is_channels_last(cast)) {
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
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x to out with the statistics that were packed.
Tensor infer(const Tensor& x, const Tensor& qkv_weight, const Optional& qkv_bias,
             const Tensor& packed) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4,
                  "x: expected a CUDA tensor of 4 dimensions (B, C, H, W)");
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
