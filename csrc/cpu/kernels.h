// What the parts of the CPU mixer know of one another: the problem, the packed weights, the scratch
// layout, and the table of kernels that each instruction set fills in.
//
// Data flow of one image:  x --product--> q, k, v --gates--> spatial gates s, pooled sums
//                          --channel_gates--> g --combine--> out
// q, k, v live in scratch as [channel block][H + 2][W + 2][lanes] with zero borders, so that the
// 3x3 convolutions need no edge cases and every access is a whole vector.
#pragma once

#include <cstddef>
#include <cstdint>

namespace casvit {

enum class DType : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

// How the qkv product is computed. Everything else is float32 whatever the dtype of x and out.
enum class Product : int64_t { F32 = 0, BF16 = 1 };

struct Geometry {
  int64_t C, H, W;
  int64_t lanes;   // vector length
  int64_t blocks;  // channel blocks of `lanes` channels
  int64_t row;     // floats in a padded row
  int64_t plane;   // floats in a padded channel block
  int64_t pixels() const { return H * W; }
  int64_t padded() const { return blocks * lanes; }
};

inline Geometry make_geometry(int64_t C, int64_t H, int64_t W, int64_t lanes) {
  Geometry g{C, H, W, lanes, (C + lanes - 1) / lanes, (W + 2) * lanes, 0};
  g.plane = (H + 2) * g.row;
  if (g.plane * 4 % 1024 == 0) g.plane += 16;  // planes must not share cache sets
  return g;
}

// x: any strides, in elements.
struct Input {
  const void* data;
  DType dtype;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// out: dense, channels first or last.
struct Output {
  void* data;
  DType dtype;
  bool channels_last;
};

// Views into the packed weights; float arrays are padded with zeros to whole blocks.
struct GateView {
  const float* depthwise;       // [blocks][9][lanes], BatchNorm folded in
  const float* depthwise_bias;  // [blocks][lanes]
  const float* spatial;         // [blocks][lanes]
  const float* channel;         // [block of outputs][C][lanes]
};
struct WeightsView {
  const unsigned char* product;  // layout private to the instruction set
  const float* balance;          // [C, padded]: see Kernels::balanced
  const float* matrix;           // [3][padded][C], what `product` was made from, likewise
  const float* qkv_bias;         // [3][padded]
  GateView gate[2];              // q, k
  const float *dwc, *dwc_bias, *proj, *proj_bias;
};

// What the training kernels read of one gate.
struct TrainingGate {
  const float* depthwise;        // [blocks][9][lanes], as it is
  const float* depthwise_bias;   // [padded], as it is
  const float* normalized;       // times rstd: the convolution then yields n^
  const float* normalized_bias;  // [padded], (bias - mean) * rstd
  const float *gamma, *beta;     // [padded]
  const float* spatial;          // [padded]
};

// The arrays of one call of a backward phase. Gradients at q, k, v are rows of pixels, as the
// product's own gradients (matrix products) want them; padded lanes are zero wherever blocks are.
struct BackwardCombine {
  const Input* grad;
  const float* planes;   // [images][q, k, v][blocks] planes
  const float* spatial;  // [images][2][pixels]
  const float* channel;  // [2][images][padded]
  int64_t images;
  float* grad_qkv;  // [images][pixels][3 C]
  float* grad_sum;  // [images][blocks][pixels][lanes]
  float* pixel;     // [images][blocks][2][pixels], of one block's channels each
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
// [..][padded] floats of a strip
enum GateSums { SPATIAL_WEIGHT, GRAD_N, GRAD_N_HAT, GATE_SUMS };

// A run of pixels of one group of images, for the product.
struct PixelRun {
  const Input* x;
  const Geometry* g;
  int64_t image;  // index of the group's first image in x
  int64_t begin, end;
};

struct Kernels {
  const char* name;
  int64_t lanes;

  // The qkv product. Weights come as a dense float matrix [3][padded][C] (rows: outputs), and with
  // `balance` if the kernels are `balanced`.
  int64_t (*product_weight_bytes)(int64_t C, int64_t blocks, Product);
  void (*product_pack_weights)(const float* matrix, int64_t C, int64_t blocks, Product,
                               const float* balance, void* to);
  int64_t (*product_temp_bytes)(int64_t C, Product, int64_t pixels);
  // Writes channel blocks [block_begin, block_end) of the 3 * blocks of q, k, v for the run.
  // planes: q, k, v of the group's first image; image_floats: from one image to the next.
  void (*product)(const PixelRun&, const WeightsView&, Product, int64_t block_begin,
                  int64_t block_end, float* planes, int64_t image_floats, void* temp);

  // Spatial gate of one strip of one image. z: q or k planes; s: [pixels]; sums: [padded], the
  // strip's sum of z * s per channel (overwritten).
  void (*spatial_gate)(const Geometry&, const GateView&, const float* z, int64_t strip, float* s,
                       float* sums, float* temp);
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
  // image. Mean and sum of squared deviations of the convolution without its bias: [2][lanes]
  // doubles.
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
  // Of one block of the pooled means: with e = grad, the gradient at the channel gate's logits,
  // shift = scale * sum_o e[o] weight[o][i] and to[o][i] = sum over images of e[o] pooled[i], which
  // may be null. grad, pooled, shift: [images][padded]; weight, to: [C][C].
  void (*channel_gate_backward)(const Geometry&, const float* grad, const float* pooled,
                                const float* weight, float scale, int64_t images, int64_t block,
                                float* shift, float* to);

  // The product's own gradients; null: library products are used. grad: the gradient at q, k and v,
  // [pixels][3C]; weight: [3C][C]. Pixels count through all images; no range is empty.
  int64_t (*input_gradient_weight_bytes)(int64_t C, Product) = nullptr;
  // `lanes` columns: block `column` of the channels.
  void (*input_gradient_pack_weights)(const float* weight, int64_t C, Product, int64_t column,
                                      const float* balance, void* to) = nullptr;
  int64_t (*input_gradient_temp_bytes)(int64_t C, Product) = nullptr;
  void (*input_gradient)(const Geometry&, const float* grad, const void* weights,
                         const float* balance, const float* weight, Product, int64_t begin,
                         int64_t end, const Output& grad_x, void* temp) = nullptr;
  // Rows of [3C][C], summed over the pixels; row_begin is a multiple of 16.
  int64_t (*weight_gradient_temp_bytes)(int64_t C, int64_t tiles, Product) = nullptr;
  void (*weight_gradient)(const Geometry&, const float* grad, const Input& x, Product,
                          int64_t begin, int64_t end, int64_t row_begin, int64_t row_end, float* to,
                          void* temp) = nullptr;

  // Whether the product and the gradient of x compare the terms of a sum with one another. Then x
  // and grad are multiplied, and weights divided, by `balance`, the largest weight of each term: x
  // and grad then say how large terms are.
  // Where these differ too much the kernels go back to the weights as they are.
  bool balanced = false;
};

// Of the columns [begin, end), or the rows, of a dense matrix.
void balance_columns(const float* matrix, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                     float* to);
void balance_rows(const float* matrix, int64_t columns, int64_t begin, int64_t end, float* to);
// Floats of a balance; those past the end are 1.
inline int64_t padded_balance(int64_t terms) { return (terms + 63) / 64 * 64; }

// Strips: the unit of work of the spatial gates, fixed by the shape alone so that results do not
// depend on the number of threads.
struct Strips {
  int64_t columns, rows;  // size of one strip
  int64_t across, count;
};
inline Strips make_strips(const Geometry& g) {
  const int64_t most = 448;  // partial sums of a strip stay in the first-level cache
  Strips s{};
  s.across = (g.W + 111) / 112;
  s.columns = (g.W + s.across - 1) / s.across;
  s.across = (g.W + s.columns - 1) / s.columns;
  s.rows = most / s.columns;
  if (s.rows < 1) s.rows = 1;
  if (s.rows > g.H) s.rows = g.H;
  int64_t down = (g.H + s.rows - 1) / s.rows;
  s.rows = (g.H + down - 1) / down;
  s.count = s.across * ((g.H + s.rows - 1) / s.rows);
  return s;
}
inline int64_t spatial_gate_temp_floats(const Geometry& g) {
  Strips s = make_strips(g);
  return (s.rows * s.columns + g.lanes) * g.lanes;
}
// Rows of output gathered before they are transposed into channels-first memory: at least 64
// pixels, and whole cache lines of them where up to 128 pixels make such.
inline int64_t combine_rows(const Geometry& g) {
  int64_t rows = 1;
  while (rows * g.W < 64 || (rows * g.W % 16 != 0 && (rows + 1) * g.W <= 128)) ++rows;
  return rows;
}
inline int64_t combine_temp_floats(const Geometry& g) {
  return 6 * g.row + (combine_rows(g) * g.W + g.lanes) * g.lanes;
}

// Bands of rows: the unit of work of the training kernels, fixed by the problem alone for the same
// reason as strips. Small enough for the second-level cache, and enough of them for many threads.
struct Bands {
  int64_t rows, count;
};
inline Bands make_bands(const Geometry& g, int64_t images) {
  const int64_t fit = 65536 / g.row, share = g.H * images * g.blocks / 16;
  Bands b{fit < share ? fit : share, 0};
  if (b.rows < 8) b.rows = 8;  // the rows around a band are computed twice
  if (b.rows > g.H) b.rows = g.H;
  b.count = (g.H + b.rows - 1) / b.rows;
  b.rows = (g.H + b.count - 1) / b.count;
  b.count = (g.H + b.rows - 1) / b.rows;
  return b;
}
// Pixels whose channels are multiplied out and wait to be summed across the lanes.
constexpr int64_t SUMMED_PIXELS = 32;
inline int64_t backward_combine_temp_floats(const Geometry& g, const Bands& b) {
  return (b.rows + 4 + 6) * g.row + 2 * (SUMMED_PIXELS + g.W + g.lanes) * g.lanes;
}
inline int64_t backward_gate_temp_floats(const Geometry& g) {
  const Strips s = make_strips(g);
  return (s.rows * s.columns + g.lanes) * (g.lanes + 3);
}
inline int64_t backward_depthwise_temp_floats(const Geometry& g) { return 3 * g.row; }

const Kernels& portable_kernels();
const Kernels& avx2_kernels();  // the following: in builds that have them, see dispatch.cpp
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();

}  // namespace casvit
