// The mixer on a GPU, after its qkv product: launches, in the order of their dependence, on one
// stream. All functions return null, or what went wrong. Nothing is allocated or synchronised here.
#pragma once

#include <cstdint>

namespace casvit::cuda {

struct Weights;

// The cut of a single pass, in a test; zeros: the planner's.
struct SinglePassCut {
  int rows, strips, slices, images;
  bool allows(int r, int st, int sl, int im) const {
    return !rows || (rows == r && strips == st && slices == sl && images == im);
  }
};

// Sizes and device of a call; how the kernels cut it is worked out once for each and kept.
struct Problem {
  int images, channels, height, width;
  bool float16;  // else bfloat16
  int multiprocessors, shared_per_block, shared_per_multiprocessor;
  int cluster;  // most blocks that may share their memory
  void* stream;
  SinglePassCut only{};
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

// Whether `mix` is one launch, which takes no sums and, unless asked for, no spatial gates.
bool is_single_pass(const Problem& p);

// sums: (sums, 2, B, padded); pooled, channel: (2, B, C) or null; spatial: (B, 2, H, W); out in x's
// layout. In a single pass sums and spatial may be null.
const char* mix(const Problem& p, const void* qkv, const void* packed, float* sums, float* spatial,
                float* pooled, float* channel, void* out, bool channels_last);

// --- The backward; backward.cu. Weights are packed anew, with the statistics of the forward.
struct BackwardParts {
  int slices, bands, combine_blocks, gate_blocks, depthwise_blocks;
};
const char* backward_parts(const Problem& p, BackwardParts* found);

int64_t backward_packed_words(int channels);  // of 16 bytes
const char* pack_backward(const Problem& p, const Weights& weights, const float* statistics,
                          const float (&eps)[2], void* packed);

// grad, grad_sum: (B, H, W, padded); grad_qkv: (B, H, W, 3 padded), the part of v is written;
// pixel: (slices, B, 2, H, W); channel_sums: (bands, 2, B, padded); weights: (combine_blocks, 20,
// padded).
const char* backward_combine(const Problem& p, const void* qkv, const void* packed,
                             const float* spatial, const float* gates, const void* grad,
                             void* grad_qkv, void* grad_sum, float* pixel, float* channel_sums,
                             float* weights);

// pixel, logit: (B, 2, H, W); shift: (2, B, C); sums: (gate_blocks, 2, 2, padded).
const char* backward_gate(const Problem& p, const void* qkv, const void* packed,
                          const float* spatial, const float* pixel, const float* shift,
                          float* logit, float* sums);

// coefficients: (2, 3, C); weights: (depthwise_blocks, 2, 10, padded); writes the parts of q and k.
const char* backward_depthwise(const Problem& p, const void* qkv, const void* packed,
                               const float* spatial, const float* logit, const float* gates,
                               const float* shift, const float* coefficients, const void* grad_sum,
                               void* grad_qkv, float* weights);

}  // namespace casvit::cuda
