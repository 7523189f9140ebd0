// The table of kernels that each instruction set fills in (isa/*.cpp), and the arrays that they
// work on.
//
// Data flow of one image:  x --qkv--> q, k, v --spatial_gate--> gates s, pooled sums
//                          --channel_gate--> gates g --combine--> out
#pragma once

#include "cpu/network/layout.h"
#include "cpu/tokens/layout.h"

namespace casvit {

// Views into the packed weights; float arrays are padded with zeros to whole blocks.
struct GateView {
  const float* depthwise;       // [blocks][9][lanes], BatchNorm folded in
  const float* depthwise_bias;  // [blocks][lanes]
  const float* spatial;         // [blocks][lanes]
  const float* channel;         // [block of outputs][C][lanes]
};
struct WeightsView {
  const unsigned char* qkv_weight;  // layout private to the instruction set
  const float* k_scale;   // [C, padded], where kernels use it: see QkvGemmKernels::scales_k
  const float* matrix;    // [3][padded][C], dense, which qkv_weight was packed from; likewise
  const float* qkv_bias;  // [3][padded]
  GateView gate[2];       // q, k
  const float *dwc, *dwc_bias, *proj, *proj_bias;
};

// One gate in training.
struct TrainingGate {
  const float* depthwise;        // [blocks][9][lanes], as it is
  const float* depthwise_bias;   // [padded], as it is
  const float* normalized;       // times rstd: the convolution yields n^ = (d - mean) * rstd
  const float* normalized_bias;  // [padded], (bias - mean) * rstd
  const float *gamma, *beta;     // [padded]
  const float* spatial;          // [padded]
};

// The arrays of one call of a backward phase. Gradients at q, k and v are one matrix with a row for
// each pixel, the operand of the gradients of the qkv GEMM. Arrays in channel blocks are zero in
// their padding lanes.
struct BackwardCombine {
  const Input* grad;
  const float* planes;   // [images][q, k, v][blocks] planes
  const float* spatial;  // [images][2][pixels]
  const float* channel;  // [2][images][padded]
  int64_t images;
  float* grad_qkv;  // [images][pixels][3 C]
  float* grad_sum;  // [images][blocks][pixels][lanes]
  float* pixel;     // [images][blocks][2][pixels]: partial sums, one for each channel block
};
struct BackwardDepthwise {
  const float* planes;
  const float* spatial;
  const float* channel;
  const float* shift;         // [2][images][padded]
  const float* logit;         // [images][2][pixels]
  const float* coefficients;  // [2][3][padded]
  const float* grad_sum;
  int64_t images;
  float* grad_qkv;
};
// Sums over a band that the phases return, [..][lanes] doubles.
enum CombineSums { DWC = 0, PROJ = 9, DWC_BIAS = 18, PROJ_BIAS, CHANNEL_SUM, COMBINE_SUMS = 22 };
enum DepthwiseSums { DEPTHWISE = 0, DEPTHWISE_BIAS = 9, DEPTHWISE_SUMS };
// The same over a strip, [..][padded] floats.
enum GateSums { SPATIAL_WEIGHT, GRAD_N, GRAD_N_HAT, GATE_SUMS };

// q, k, v = W x. Weights come as a dense float matrix [3][padded][C], one row for each output.
struct QkvGemmKernels {
  int64_t (*weight_bytes)(int64_t C, int64_t blocks, Precision);
  void (*pack_weights)(const float* matrix, int64_t C, int64_t blocks, Precision,
                       const float* k_scale, void* to);
  int64_t (*temp_bytes)(int64_t C, Precision, int64_t pixels);
  // Writes channel blocks [block_begin, block_end) of the 3 * blocks of q, k, v for the run.
  // planes: q, k, v of the group's first image; image_floats: from one image to the next.
  void (*gemm)(const PixelRun&, const WeightsView&, Precision, int64_t block_begin,
               int64_t block_end, float* planes, int64_t image_floats, void* temp);

  // Column scaling: GEMMs in fixed point round all values of a row to one step size. So that the
  // magnitudes of x alone say how much a product weighs, x is multiplied and W divided by k_scale,
  // the largest magnitude of each column of W (of each row for the gradient of x: K is 3C there).
  // Where magnitudes still differ too much for fixed point, kernels use the weights as they are.
  bool scales_k;
};

// The gradients of the qkv GEMM. grad: the gradient at q, k and v, [pixels][3C]; weight: [3C][C].
// Pixels count through all images; no range is empty.
struct QkvBackwardKernels {
  int64_t (*input_weight_bytes)(int64_t C, Precision);
  // Packs block `column` of the channels: `lanes` columns.
  void (*input_pack_weights)(const float* weight, int64_t C, Precision, int64_t column,
                             const float* k_scale, void* to);
  int64_t (*input_temp_bytes)(int64_t C, Precision);
  // grad_x = grad W. `weights` are packed, `weight` is what they were packed from.
  void (*input)(const Geometry&, const float* grad, const void* weights, const float* k_scale,
                const float* weight, Precision, int64_t begin, int64_t end, const Output& grad_x,
                void* temp);
  int64_t (*weight_temp_bytes)(int64_t C, int64_t tiles, Precision);
  // Rows [row_begin, row_end) of grad^T x, summed over the pixels; row_begin is a multiple of 16.
  void (*weight)(const Geometry&, const float* grad, const Input& x, Precision, int64_t begin,
                 int64_t end, int64_t row_begin, int64_t row_end, float* to, void* temp);
};

// Token clustering, on rows of cells, and reconstruction: see tokens/layout.h.
struct TokenKernels {
  // One token to a row of floats, one centre back.
  void (*widen)(const void* from, DType, int64_t channels, int64_t row, float* to);
  void (*narrow)(const float* from, DType, int64_t channels, void* to);
  // Of cells [begin, end) of one row; from an even one on.
  void (*pool)(const TokenMap&, const TokenArrays&, int64_t cell_row, int64_t begin, int64_t end);
  void (*affinities)(const TokenMap&, const TokenArrays&, float temperature, int64_t cell_row,
                     int64_t begin, int64_t end, float* temp);
  void (*means)(const TokenMap&, const TokenArrays&, int64_t cell_row, int64_t begin, int64_t end,
                void* temp);
  // Tokens [begin, end) of one image. y: [cells][channels]; distances: squared, [tokens][cells].
  void (*reconstruct)(const Reconstruction&, const void* y, const float* distances, int64_t begin,
                      int64_t end, void* out, void* temp);
  // The weights alone, [tokens][cells].
  void (*weights)(const Reconstruction&, const float* distances, int64_t begin, int64_t end,
                  float* out, void* temp);
};

struct Kernels {
  const char* name;
  int64_t lanes;

  QkvGemmKernels qkv;

  // Spatial gate of one strip of one image. z: q or k planes; s: [pixels]; sums: [padded], the
  // strip's sum of z * s per channel (overwritten).
  void (*spatial_gate)(const Geometry&, const GateView&, const float* z, const Strips&,
                       int64_t strip, float* s, float* sums, float* temp);
  // gate[image][o] = sigmoid(sum_i channel[i][o] * pooled[image][i]), o in [begin, end) blocks.
  void (*channel_gate)(const Geometry&, const GateView&, const float* pooled, float* gate,
                       int64_t images, int64_t begin, int64_t end);
  // One block of outputs of a dense [C][C] matrix to its place in GateView::channel.
  void (*pack_channel_gate)(const float* matrix, int64_t C, int64_t block, float* to);
  // Rows [y_begin, y_end) of channel block `block` of one image, from q, k, v planes to out.
  void (*combine)(const Geometry&, const WeightsView&, const float* planes, const float* s,
                  const float* const gate[2], int64_t block, int64_t y_begin, int64_t y_end,
                  const Output&, int64_t image, float* temp);

  // Training. All but backward_gate work on rows [y_begin, y_end) of one channel block of one
  // image. moments: mean and sum of squared deviations of the convolution without bias, [2][lanes].
  void (*moments)(const Geometry&, const float* taps, const float* plane, int64_t y_begin,
                  int64_t y_end, double* moments);
  void (*backward_combine)(const Geometry&, const WeightsView&, const BackwardCombine&,
                           int64_t image, int64_t block, int64_t y_begin, int64_t y_end,
                           double* sums, float* temp);
  // One strip of one gate. z: q or k planes; s, pixel, logit: [pixels]; shift: [padded].
  void (*backward_gate)(const Geometry&, const TrainingGate&, const float* z, const float* s,
                        const float* pixel, const float* shift, int64_t strip, float* logit,
                        float* sums, float* temp);
  void (*backward_depthwise)(const Geometry&, const TrainingGate&, const BackwardDepthwise&,
                             int64_t which, int64_t image, int64_t block, int64_t y_begin,
                             int64_t y_end, double* sums, float* temp);
  // One channel block i. With e = grad, the gradient at the logits of the channel gate: shift[i] =
  // scale * sum_o e[o] weight[o][i], and to[o][i] = sum over images of e[o] pooled[i], unless `to`
  // is null. grad, pooled, shift: [images][padded]; weight, to: [C][C].
  void (*channel_gate_backward)(const Geometry&, const float* grad, const float* pooled,
                                const float* weight, float scale, int64_t images, int64_t block,
                                float* shift, float* to);

  QkvBackwardKernels qkv_backward;
  TokenKernels tokens;
  NetworkKernels network;
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();  // the following: in builds that have them, see dispatch.cpp
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();

}  // namespace casvit
