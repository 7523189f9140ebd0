// Enters an instruction set's own gradients of the product into its table of kernels; to be
// included after the file that has them.
#pragma once

#include "cpu/kernels.h"

namespace casvit {
namespace CASVIT_ISA {

static Kernels with_own_gradients(Kernels k) {
  k.input_gradient_weight_bytes = input_gradient_weight_bytes;
  k.input_gradient_pack_weights = input_gradient_pack_weights;
  k.input_gradient_temp_bytes = input_gradient_temp_bytes;
  k.input_gradient = input_gradient;
  k.weight_gradient_temp_bytes = weight_gradient_temp_bytes;
  k.weight_gradient = weight_gradient;
  return k;
}

}  // namespace CASVIT_ISA
}  // namespace casvit
