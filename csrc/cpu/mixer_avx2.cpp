// The kernels compiled for one instruction set; the flags are set in setup.py.
#define CASVIT_ISA avx2
#include "backward.h"
#include "gradient.h"
#include "mixing.h"
#include "product.h"
#include "statistics.h"

namespace casvit {

const Kernels& avx2_kernels() {
  using namespace avx2;
  static const Kernels kernels = {"avx2",
                                  VL,
                                  product_weight_bytes,
                                  product_pack_weights,
                                  product_temp_bytes,
                                  product,
                                  spatial_gate,
                                  channel_gate,
                                  pack_channel_gate,
                                  combine,
                                  moments,
                                  backward_combine,
                                  backward_gate,
                                  backward_depthwise,
                                  channel_gate_backward,
                                  input_gradient_weight_bytes,
                                  input_gradient_pack_weights,
                                  input_gradient_temp_bytes,
                                  input_gradient,
                                  weight_gradient_temp_bytes,
                                  weight_gradient};
  return kernels;
}

}  // namespace casvit
