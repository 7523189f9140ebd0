// Inference over a batch: threads, scratch memory and the order of the phases.
#pragma once

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace casvit {

void infer(const Kernels&, const Geometry&, const WeightsView&, Precision, const Input&,
           const Output&, int64_t batch, const ThreadPool&);

// Scratch of the calling thread for weights that are packed for one call only.
void* scratch_for_packing(int64_t bytes);

}  // namespace casvit
