// Plain C++, for any CPU.
#define CASVIT_ISA portable
#include "cpu/isa/vector_kernels.h"

namespace casvit {

const Kernels& portable_kernels() {
  static const Kernels kernels = [] {
    Kernels k = portable::vector_kernels("portable");
    k.qkv_backward = {};
    return k;
  }();
  return kernels;
}

}  // namespace casvit
