// The kernels compiled for one instruction set; the flags are set in setup.py.
#define CASVIT_ISA portable
#include "mixing.h"
#include "product.h"

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
                                  combine};
  return kernels;
}

}  // namespace casvit
