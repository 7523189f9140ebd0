// The packed weights of one mixer: BatchNorm folded into the depthwise convolutions of the gates,
// everything in the order the kernels read it. One block of bytes: a header, where the weights came
// from (see remember_sources), then the arrays.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace casvit {

// A parameter or buffer where it lies, any strides; data == nullptr: absent.
struct Source {
  const void* data = nullptr;
  DType dtype = DType::F32;
  int64_t stride[4] = {0, 0, 0, 0};
  int64_t span = 0;  // elements from the first to the last in memory
};

struct GateSources {
  Source depthwise_weight, depthwise_bias, norm_weight, norm_bias, norm_mean, norm_var,
      spatial_weight, channel_weight;
  double eps;
};

struct Sources {
  int64_t C;
  Source qkv_weight, qkv_bias;
  GateSources gate[2];
  Source dwc_weight, dwc_bias, proj_weight, proj_bias;
};

struct PackedHeader {
  int64_t magic;
  char isa[16];
  int64_t product;
  int64_t channels;
  uint64_t fingerprint;  // of sampled values of all sources
  int64_t stale;         // byte 48, read by casvit_kernels/packing.py
  double eps[2];
};
static_assert(offsetof(PackedHeader, stale) == 48, "packing.py reads this offset");

int64_t packed_bytes(const Kernels&, int64_t C, Product);
void pack(const Kernels&, const Sources&, Product, void* to);
// Whether `packed` was made by pack() for this problem from these values; notes it when not.
bool is_current(const Kernels&, const Sources&, Product, void* packed, int64_t bytes);
// Notes in `packed` where it came from; false: it is none of these. pack() does not: equal weights
// shall give equal bytes.
bool remember_sources(const Sources&, void* packed, int64_t bytes);
// Those sources, whose memory the caller knows to be there still; nullptr: nothing was noted, or
// for other kernels or channels.
const Sources* sources_of(const Kernels&, int64_t C, Product, const void* packed, int64_t bytes);
WeightsView view(const Kernels&, int64_t C, Product, const void* packed);

// norm_weight / sqrt(norm_var + eps)
double normalizer(const GateSources&, int64_t channel);
// A vector as dense floats.
void pack_vector(const Source&, int64_t n, float* to);
// A (rows, columns) matrix as dense floats: where it lies, or copied to `scratch` if it is no such.
const float* dense_matrix(const Source&, int64_t rows, int64_t columns, float* scratch);

// Parts of that for the phases of training, in scratch of the calling thread until the next call.
// Absent in a view is what its phase does not read.
// The qkv product alone.
WeightsView pack_product(const Kernels&, int64_t C, const Source& qkv_weight,
                         const Source& qkv_bias, Product, const Pool&);
// Everything but the product.
WeightsView pack_mixing(const Kernels&, const Sources&, const Pool&);
// The depthwise convolutions dwc and proj.
WeightsView pack_combine(const Kernels&, const Sources&);
// The gates, with the statistics among the sources.
struct TrainingGates {
  TrainingGate gate[2];
};
TrainingGates pack_gates(const Kernels&, const Sources&);
// The gates' depthwise convolutions alone, which need no statistics.
TrainingGates pack_taps(const Kernels&, const Sources&);

}  // namespace casvit
