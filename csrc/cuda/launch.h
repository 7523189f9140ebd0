// One launch, checked.
#pragma once

#include <cstdint>

#include "device.h"

#ifndef CASVIT_EMULATED

#define CASVIT_PARAMETER const __grid_constant__

namespace casvit::cuda {

struct Grid {
  int x, y, z;
};

template <class Arguments>
const char* launch(void (*kernel)(Arguments), Grid grid, int threads, uint32_t shared, void* stream,
                   const Arguments& a) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared, static_cast<cudaStream_t>(stream)>>>(a);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace casvit::cuda
#endif
