// One forward pass over a batch: threads, scratch memory and the order of the phases.
#pragma once

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace casvit {

void forward(const Kernels&, const Geometry&, const WeightsView&, Product, const Input&,
             const Output&, int64_t batch, const Pool&);

// Packed weights made for one call only live in the calling thread's scratch.
void* scratch_for_packing(int64_t bytes);

}  // namespace casvit
