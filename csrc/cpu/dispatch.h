// Which instruction sets this build and this CPU have, and which one is in use.
#pragma once

#include "cpu/kernels.h"

namespace casvit {

// The kernels in use: what CASVIT_KERNELS_CPU_ISA names, else the best this CPU can run.
const Kernels& active_kernels();

}  // namespace casvit
