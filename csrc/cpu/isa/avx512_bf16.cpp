// The products in bf16 on AVX-512's own instruction for it; everything else is AVX-512's.
#define CASVIT_ISA avx512_bf16
#include "cpu/gemm/qkv.h"
#include "cpu/gemm/qkv_backward.h"

#include "cpu/gemm/own_gradients.h"

namespace casvit {

const Kernels& avx512_bf16_kernels() {
  using namespace avx512_bf16;
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "avx512_bf16";
    k.product_weight_bytes = product_weight_bytes;
    k.product_pack_weights = product_pack_weights;
    k.product_temp_bytes = product_temp_bytes;
    k.product = product;
    return with_own_gradients(k);
  }();
  return kernels;
}

}  // namespace casvit
