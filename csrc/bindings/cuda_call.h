// What the files of CUDA operators share: the call as csrc/cuda takes it, and pointers out of
// tensors. Needs neither CUDA's headers nor libtorch_cuda: the current stream's getter is looked up
// where the process has it.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "bindings/tensors.h"
#include "cuda/mixer.h"
#include "cuda/weights.h"

namespace casvit::binding {

inline void check(const char* wrong) { STD_TORCH_CHECK(!wrong, "CUDA kernels: ", wrong); }

// Of a library that the process has loaded. Python loads torch's with RTLD_LOCAL, so that the
// global scope has none of them, and this library's own scope has libtorch_cpu alone.
inline void* loaded_symbol(const char* library, const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

using StreamGetter = AOTITorchError (*)(int32_t, void**);

inline StreamGetter stream_getter() {
  static const auto getter = reinterpret_cast<StreamGetter>(
      loaded_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  return getter;
}

inline void* current_stream(int device) {
  const StreamGetter getter = stream_getter();
  STD_TORCH_CHECK(getter, "CUDA kernels: this PyTorch has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == AOTI_TORCH_SUCCESS,
                  "CUDA kernels: torch does not give its current stream");
  return stream;
}

inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    default: return "scalar type " + std::to_string(static_cast<int>(dtype));
  }
}

// What came, for the messages of checks.
inline std::string described(const Tensor& t) {
  const std::string where = t.is_cuda()  ? "CUDA device " + std::to_string(t.get_device_index())
                            : t.is_cpu() ? "the CPU"
                                         : "a device that is neither";
  return std::string(t.is_contiguous() ? "a contiguous " : "a strided ") +
         name_of(t.scalar_type()) + " tensor of " + std::to_string(t.dim()) + " dimensions and " +
         std::to_string(t.numel()) + " elements on " + where;
}

inline cuda::Problem problem(const Tensor& like, const std::array<int64_t, 4>& shape,
                             ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dtype: expected bfloat16 or float16, got ", name_of(dtype));
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

inline std::array<int64_t, 4> shape_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  STD_TORCH_CHECK(sizes.size() == 4, "shape: expected (B, C, H, W), got ", sizes.size(),
                  " dimensions");
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

inline int64_t padded(int64_t channels) { return (channels + 3) / 4 * 4; }

template <size_t N>
Tensor floats(const Tensor& like, const std::array<int64_t, N>& sizes) {
  return torch::stable::new_empty(like, {sizes.data(), N}, ScalarType::Float);
}

// Keeps contiguous copies of weights alive while pointers to them are used.
class Kept {
 public:
  cuda::Weight weight(const Tensor& t, const char* name, int64_t numel) {
    STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor, got ", described(t));
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

// All weights but those of the product, as pointers that `kept` keeps alive.
inline cuda::Weights weights_of(Kept& kept, WEIGHT_PARAMETERS) {
  const int64_t C = dwc_bias.numel();
  const auto gate = [&](const Tensor& depthwise, const Tensor& bias, const Optional& norm_weight,
                        const Optional& norm_bias, const Tensor& spatial, const Tensor& channel) {
    return cuda::GateWeights{KEPT(depthwise, 9 * C), KEPT(bias, C),    KEPT(norm_weight, C),
                             KEPT(norm_bias, C),     KEPT(spatial, C), KEPT(channel, C * C)};
  };
  return {{gate(q_depthwise_weight, q_depthwise_bias, q_norm_weight, q_norm_bias, q_spatial_weight,
                q_channel_weight),
           gate(k_depthwise_weight, k_depthwise_bias, k_norm_weight, k_norm_bias, k_spatial_weight,
                k_channel_weight)},
          KEPT(dwc_weight, 9 * C),
          KEPT(dwc_bias, C),
          KEPT(proj_weight, 9 * C),
          KEPT(proj_bias, C)};
}
#undef KEPT
#define CASVIT_NAME_OF(prefix, field, ...) prefix##field,
#define WEIGHT_NAMES CASVIT_MIXER_WEIGHTS(CASVIT_NAME_OF) eps_q, eps_k

// A contiguous float32 tensor of so many elements on the device of `like`.
inline const float* floats_of(const Tensor& t, const char* name, int64_t numel,
                              const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                      t.is_contiguous() && t.numel() == numel &&
                      t.scalar_type() == ScalarType::Float,
                  name, ": expected a contiguous float32 tensor of ", numel,
                  " elements on CUDA device ", like.get_device_index(), ", got ", described(t));
  return static_cast<const float*>(t.const_data_ptr());
}
inline float* data(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// A contiguous map in the dtype and on the device of `like`, from a multiple of 16 bytes on.
inline void check_rows(const Tensor& t, const char* name, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(
      t.is_cuda() && t.get_device_index() == like.get_device_index() && t.is_contiguous() &&
          t.numel() == numel && t.scalar_type() == like.scalar_type(),
      name, ": expected a contiguous ", name_of(like.scalar_type()), " tensor of ", numel,
      " elements on CUDA device ", like.get_device_index(), ", got ", described(t));
  const uintptr_t past = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16;
  STD_TORCH_CHECK(past == 0, name, ": expected an address that is a multiple of 16, got one ", past,
                  " bytes past it");
}

// words: of 16 bytes, that packing for C channels makes.
inline void check_inputs(const Tensor& qkv, const Tensor& packed,
                         const std::array<int64_t, 4>& shape, int64_t words) {
  const auto [B, C, H, W] = shape;
  check_rows(qkv, "qkv", B * H * W * 3 * padded(C), qkv);
  floats_of(packed, "packed", 4 * words, qkv);
}

}  // namespace casvit::binding
