// The mixer's weights as the user has them, without those of the qkv product.
#pragma once

namespace casvit::cuda {

// Contiguous float32, bfloat16 or float16; null for none.
struct Weight {
  const void* data;
  int dtype;  // 0: float32, 1: bfloat16, 2: float16
};

struct GateWeights {
  Weight depthwise, bias, norm_weight, norm_bias, spatial, channel;
};

struct Weights {
  GateWeights gates[2];  // q, k
  Weight dwc, dwc_bias, proj, proj_bias;
};

}  // namespace casvit::cuda
