// The mixer on a GPU, after its qkv product: launches, in the order of their dependence, on one
// stream. All functions return null, or what went wrong. Nothing is allocated or synchronised here.
#pragma once

#include <cstdint>

namespace casvit::cuda {

struct Weights;

// Sizes and device of a call; how the kernels cut it is worked out once for each and kept.
struct Problem {
  int images, channels, height, width;
  bool float16;  // else bfloat16
  int multiprocessors, shared_per_block, shared_per_multiprocessor;
  void* stream;
};

// Fills in what a plan needs to know of a device. Not in the emulation.
const char* look_at_device(int device, Problem* p);

// Blocks that write sums (of the gates) and moments (of the statistics).
struct Parts {
  int sums, moments;
};
const char* parts(const Problem& p, Parts* found);

int64_t packed_words(int channels);  // of 16 bytes

// statistics: (2, 2, C) mean and biased variance; null for taps without them, which `statistics`
// takes.
const char* pack(const Problem& p, const Weights& weights, const float* statistics,
                 const float (&eps)[2], void* packed);

// counts: (moments), moments: (moments, 2, 2, padded), result: (2, 2, C).
const char* statistics(const Problem& p, const void* qkv, const void* packed, float* counts,
                       float* moments, float* result);

// sums: (sums, 2, B, padded); pooled, channel: (2, B, C) or null; spatial: (B, 2, H, W); out in x's
// layout.
const char* mix(const Problem& p, const void* qkv, const void* packed, float* sums, float* spatial,
                float* pooled, float* channel, void* out, bool channels_last);

}  // namespace casvit::cuda
