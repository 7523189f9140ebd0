// AVX2 with FMA and F16C.
#define CASVIT_ISA avx2
#include "cpu/isa/vector_kernels.h"

namespace casvit {

const Kernels& avx2_kernels() {
  static const Kernels kernels = avx2::vector_kernels("avx2");
  return kernels;
}

}  // namespace casvit
