// Plain C++, for any CPU.
#define CASVIT_ISA portable
#include "cpu/isa/vector_kernels.h"

namespace casvit {

const Kernels& portable_kernels() {
  static const Kernels kernels = portable::vector_kernels("portable");
  return kernels;
}

}  // namespace casvit
