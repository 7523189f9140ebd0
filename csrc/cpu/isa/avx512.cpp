// AVX-512 (F, BW, VL, DQ).
#define CASVIT_ISA avx512
#include "cpu/isa/vector_kernels.h"

namespace casvit {

const Kernels& avx512_kernels() {
  static const Kernels kernels = avx512::vector_kernels("avx512");
  return kernels;
}

}  // namespace casvit
