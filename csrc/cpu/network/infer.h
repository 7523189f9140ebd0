// A whole network on threads.
#pragma once

#include "cpu/network/weights.h"
#include "cpu/thread_pool.h"

namespace casvit {

struct NetworkInput {
  const void* data;
  bool bytes;  // uint8
  int64_t batch, H, W;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// Bytes of scratch of a call; its content does not matter, and one call at a time may use it. What
// a call finds of the one before it, of the same kind, it does not make again.
int64_t network_scratch_bytes(const Kernels&, const NetworkPlan&, Precision, int64_t batch,
                              int64_t H, int64_t W, int64_t threads);
// outs: the maps of the returned stages, then the head's output, float32: dense maps, channels
// first or last, and rows. Results do not depend on what else is in the batch, up to the threads
// that images share where there are more threads than images.
void infer_network(const Kernels&, const NetworkPlan&, Precision, const void* packed,
                   const NetworkInput&, const Output* outs, void* scratch, const ThreadPool&);

}  // namespace casvit
