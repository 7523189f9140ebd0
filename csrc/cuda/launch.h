// One launch, checked.
#pragma once

#include <cstdint>
#include <cstdio>

#include "device.h"

#ifndef CASVIT_EMULATED

#define CASVIT_PARAMETER const __grid_constant__

namespace casvit::cuda {

struct Grid {
  int x, y, z;
};

// Null for success. By the name under which torch reports them, too: bench/gpu looks for it. Takes
// the error away, so that the next launch does not report it again.
inline const char* what(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  static thread_local char text[256];
  std::snprintf(text, sizeof text, "CUDA error: %s", cudaGetErrorString(error));
  cudaGetLastError();
  return text;
}

inline cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// cluster: blocks along x that share their memory; they divide the grid's.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), Grid grid, int threads, uint32_t shared, void* stream,
                   const Arguments& a, int cluster = 1) {
  if (shared > 48 * 1024) {
    // As much as the device allows, not what this call takes: between a thread's setting and its
    // launch another thread may set the same kernel's.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return what(error);
  }
  const dim3 blocks(grid.x, grid.y, grid.z);
  if (cluster == 1) {
    kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(a);
    return what(cudaGetLastError());
  }
  cudaLaunchAttribute attribute = cluster_of(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return what(cudaLaunchKernelEx(&config, kernel, a));
}

}  // namespace casvit::cuda
#endif
