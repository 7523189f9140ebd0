// AMX: the GEMMs on the matrix unit of recent Xeons; gates and combination are AVX-512's,
// whole networks those of AVX512_BF16.
#define CASVIT_ISA amx
#include "cpu/amx/qkv.h"
#include "cpu/amx/qkv_backward.h"

namespace casvit {

const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "amx";
    k.network = avx512_bf16_kernels().network;
    k.qkv = amx::QKV_GEMM;
    k.qkv_backward = amx::QKV_BACKWARD;
    return k;
  }();
  return kernels;
}

}  // namespace casvit
