// The kernels compiled for one instruction set; the flags are set in setup.py.
#define CASVIT_ISA portable
#include "cpu/gemm/qkv.h"
#include "cpu/mixer/backward.h"
#include "cpu/mixer/gates.h"
#include "cpu/mixer/statistics.h"

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
