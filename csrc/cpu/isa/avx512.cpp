// The kernels compiled for one instruction set; the flags are set in setup.py.
#define CASVIT_ISA avx512
#include "cpu/gemm/qkv.h"
#include "cpu/gemm/qkv_backward.h"
#include "cpu/mixer/backward.h"
#include "cpu/mixer/gates.h"
#include "cpu/mixer/statistics.h"

#include "cpu/gemm/own_gradients.h"

namespace casvit {

const Kernels& avx512_kernels() {
  using namespace avx512;
  static const Kernels kernels = with_own_gradients(
      {"avx512", VL, product_weight_bytes, product_pack_weights, product_temp_bytes, product,
       spatial_gate, channel_gate, pack_channel_gate, combine, moments, backward_combine,
       backward_gate, backward_depthwise, channel_gate_backward});
  return kernels;
}

}  // namespace casvit
