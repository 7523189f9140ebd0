// Token reconstruction of a batch: threads and scratch memory.
#pragma once

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace casvit {

// y: [images][cells][channels] and out: [images][tokens][channels], both of r's dtype; distances:
// [images][tokens][cells], squared.
void reconstruct_tokens(const Kernels&, const Reconstruction& r, const void* y,
                        const float* distances, int64_t images, int64_t tokens, void* out,
                        const ThreadPool&);
// The weights that it takes, [images][tokens][cells].
void token_weights(const Kernels&, const Reconstruction& r, const float* distances, int64_t images,
                   int64_t tokens, float* out, const ThreadPool&);

}  // namespace casvit
