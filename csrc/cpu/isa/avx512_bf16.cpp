// AVX512_BF16: the GEMMs in bf16 on its dot product, those of whole networks too; everything else
// is AVX-512's.
#define CASVIT_ISA avx512_bf16
#include "cpu/gemm/qkv.h"
#include "cpu/gemm/qkv_backward.h"
#include "cpu/network/kernels.h"

namespace casvit {

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "avx512_bf16";
    k.qkv = avx512_bf16::QKV_GEMM;
    k.qkv_backward = avx512_bf16::QKV_BACKWARD;
    k.network = avx512_bf16::NETWORK;
    return k;
  }();
  return kernels;
}

}  // namespace casvit
