// One forward pass over a batch: threads, scratch memory and the order of the phases.
#pragma once

#include "mixer.h"

namespace casvit {

// Runs tasks [0, count) on the caller's thread pool, each once.
struct Pool {
  int64_t threads;
  void (*run)(int64_t count, void (*task)(void* context, int64_t index), void* context);
};

void forward(const Kernels&, const Geometry&, const WeightsView&, Product, const Input&,
             const Output&, int64_t batch, const Pool&);

// Packed weights made for one call only live in the calling thread's scratch.
void* scratch_for_packing(int64_t bytes);

}  // namespace casvit
