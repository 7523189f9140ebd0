// The kernels compiled for one instruction set; the flags are set in setup.py.
#define CASVIT_ISA portable
#include "backward.h"
#include "mixing.h"
#include "product.h"
#include "statistics.h"

namespace casvit {

const Kernels& portable_kernels() {
  using namespace portable;
  static const Kernels kernels = {"portable",
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
                                  channel_gate_backward};
  return kernels;
}

}  // namespace casvit
