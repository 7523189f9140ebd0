// The packed weights of one mixer: BatchNorm folded into the depthwise convolutions of the gates,
// every array in the layout its kernel reads. One block of bytes: a header, the sources (see
// remember_sources), then the arrays.
#pragma once

#include <cstddef>

#include "cpu/kernels.h"
#include "cpu/sources.h"
#include "cpu/thread_pool.h"

namespace casvit {

struct PackedHeader {
  int64_t magic;
  char isa[16];
  int64_t precision;
  int64_t channels;
  uint64_t fingerprint;  // see sources.h
  int64_t stale;         // byte 48, read by casvit_kernels/ops/mixer/packed.py
  double eps[2];
};
static_assert(offsetof(PackedHeader, stale) == 48, "packed.py reads this offset");

int64_t packed_bytes(const Kernels&, int64_t C, Precision);
void pack(const Kernels&, const Sources&, Precision, void* to);
// Whether pack() made `packed` for this problem from these values; sets its stale flag if not.
bool is_current(const Kernels&, const Sources&, Precision, void* packed, int64_t bytes);
// Stores the sources in `packed`; false if that holds no packed weights of as many channels. pack()
// does not store them: equal weights are to give equal bytes.
bool remember_sources(const Sources&, void* packed, int64_t bytes);
// Those sources; the caller knows that their memory is still there. nullptr if none are stored, or
// for other kernels or channels.
const Sources* sources_of(const Kernels&, int64_t C, Precision, const void* packed, int64_t bytes);
WeightsView view(const Kernels&, int64_t C, Precision, const void* packed);

// Packing for the phases of training, into scratch of the calling thread that lasts until the next
// call. Views hold only what the phase reads. The qkv GEMM.
WeightsView pack_qkv(const Kernels&, int64_t C, const Source& qkv_weight, const Source& qkv_bias,
                     Precision, const ThreadPool&);
// Everything but the qkv GEMM.
WeightsView pack_mixing(const Kernels&, const Sources&, const ThreadPool&);
// The depthwise convolutions dwc and proj.
WeightsView pack_combine(const Kernels&, const Sources&);
// The gates, normalised by the statistics among the sources.
struct TrainingGates {
  TrainingGate gate[2];
};
TrainingGates pack_gates(const Kernels&, const Sources&);
// The gates' depthwise convolutions alone, which need no statistics.
TrainingGates pack_taps(const Kernels&, const Sources&);

}  // namespace casvit
