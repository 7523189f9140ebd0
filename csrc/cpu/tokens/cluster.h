// Token clustering of a batch: threads, scratch memory and the order of the phases.
#pragma once

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace casvit {

// A batch of maps of tokens whose channels are consecutive; strides in elements.
struct TokenBatch {
  const void* data;
  DType dtype;
  int64_t images, image_stride, token_stride;
};

// centres: [images][cells][channels] in the dtype of x; affinity: [images][tokens][slots]. `row` of
// the map is set here.
void cluster_tokens(const Kernels&, TokenMap, const TokenBatch& x, int64_t iterations,
                    float temperature, void* centres, float* affinity, const ThreadPool&);

}  // namespace casvit
