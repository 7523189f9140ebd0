// A whole network: its plan, its layers as they are packed, and the arrays that its kernels work
// on.
//
// Maps lie in channel blocks, [block][pixel][lanes]; the pixels count through the images of a
// group, row by row. Operands of the GEMMs are words of 32 bits, [block][pixel][words]: a float, or
// two neighbouring channels in bf16.
#pragma once

#include <cstdint>

#include "cpu/layout.h"

namespace casvit {

// What casvit_kernels/ops/network/plan.py writes as integers; points into them.
struct NetworkPlan {
  static constexpr int64_t MOST_STAGES = 8;
  struct Stage {
    int64_t C, depth;
    bool returned;          // its map is an output, normed
    const int64_t* hidden;  // [depth]: channels inside each block's Mlp
  };
  enum Head : int64_t { NOTHING = 0, MAP = 1, POOLED = 2, LOGITS = 3 };
  int64_t in_chans, stem_mid;
  bool normalized;
  int64_t stages;
  Stage stage[MOST_STAGES];
  int64_t head, classes;
};
// Throws std::invalid_argument where the integers are no plan.
NetworkPlan read_plan(const int64_t* from, int64_t count);

// A 1x1 convolution, or one whose inputs are gathered first: groups of `group` blocks of outputs,
// each [k_steps][blocks of the group][lanes].
struct Linear {
  int64_t blocks, k_steps, group;
  int64_t chain;  // K steps that are summed up in one register, at least a segment
  const float* weights;
  const float* bias;  // [blocks][lanes]
};

// The left operand: its K steps come in segments, each from one place on.
struct Operand {
  const float* data;
  int64_t segments;
  const int64_t* offset;  // in words, from the data of a pixel
  const int64_t* k_steps;
};
constexpr int64_t MOST_SEGMENTS = 9 * 256;

// What becomes of sums: `to` + block * block_stride + pixel * lanes (words for an operand).
struct Epilogue {
  enum Kind {
    STORE,   // a map
    RELU,    // a map
    ADD,     // a map, onto `residual`, which lies as `to` does
    GELU,    // an operand
    PLACES,  // to + block * block_stride + places[pixel]
    ROWS,    // dense rows of `row` floats, the last block cut
  } kind;
  float* to;
  int64_t block_stride;
  const float* residual;
  const int64_t* places;
  int64_t row;
};

// Rows of a ring of `slots` rows for each block: row y is in slot y % slots, with a halo of one
// pixel at either side. Rows count through the images.
struct Ring {
  float* data;
  int64_t plane, row, slots;
  const float* zeros;  // a row
};

struct DepthwiseWeights {
  const float* taps;  // [blocks][9][lanes]
  const float* bias;  // [blocks][lanes]
};

// The image, to the rows of the stem.
struct Image {
  const void* data;
  bool bytes;  // uint8, to be divided by 255
  int64_t channels, H, W;
  int64_t channel_stride, row_stride, column_stride;  // in elements
  const float* padding;                               // [channels]: the value around the image
};

// The first convolution, [k = (channel, dy, dx)][mid], and its output, planar:
// [words of mid][stride], pixel 0 at `lanes`; zeros at either side.
struct StemWeights {
  const float* weights;
  const float* bias;
  int64_t mid;
};
inline int64_t stem_row_stride(int64_t W1, int64_t lanes) {
  return (W1 + lanes - 1) / lanes * lanes + 2 * lanes;
}
// The columns of three rows of the image, even and odd ones apart.
inline int64_t stem_split_floats(int64_t channels, int64_t W1, int64_t lanes) {
  return 3 * channels * 2 * stem_row_stride(W1, lanes);
}

struct NetworkKernels {
  // Words of a channel block in an operand; 0: this precision is not there.
  int64_t (*words)(Precision);
  int64_t (*k_steps)(int64_t K, Precision);
  // One group of `blocks` blocks of outputs. at(k) of an output: matrix[output * K + k]; outputs
  // past `outputs` are zeros. segment: values of K that share whole words, K where all do.
  void (*pack)(const float* matrix, int64_t outputs, int64_t K, int64_t segment, Precision,
               int64_t blocks, float* to);
  // Blocks [begin, end) of the outputs for `count` pixels. `next`: what is read next.
  void (*linear)(const Linear&, const Operand&, Precision, int64_t count, int64_t begin,
                 int64_t end, const Epilogue&, const float* next);
  // The same from planar rows: pixel i at 2 i, a K step `term_stride` further.
  void (*stem_linear)(const Linear&, const Operand&, int64_t term_stride, Precision, int64_t count,
                      const Epilogue&, const float* next);
  // Pixels of a map to an operand, [block][count][words].
  void (*operand)(const float* map, int64_t block_stride, int64_t count, int64_t blocks, Precision,
                  float* to);
  // The neighbourhoods of output pixels [begin, end) of a convolution 3x3 of stride 2 over one
  // image of a map, [9][blocks][count][words].
  void (*neighbourhoods)(const float* map, int64_t block_stride, int64_t H, int64_t W,
                         int64_t blocks, Precision, int64_t begin, int64_t end, float* to);
  // GELU(depthwise) of rows [y_begin, y_end), blocks [begin, end), to an operand of
  // `pixels` pixels, the first of which is that of row y_begin: [block][pixels][words].
  void (*depthwise_gelu)(const Ring&, const DepthwiseWeights&, int64_t H, int64_t W, Precision,
                         int64_t y_begin, int64_t y_end, int64_t begin, int64_t end, int64_t pixels,
                         float* to);
  // Row y of the first convolution with ReLU; zeros outside of its output.
  void (*stem_row)(const Image&, const StemWeights&, Precision, int64_t y, float* split, float* to);
  // As Kernels::combine, added to a map: `to` is channel block `block` of the image.
  void (*combine)(const Geometry&, const DepthwiseWeights& dwc, const DepthwiseWeights& proj,
                  const float* planes, const float* s, const float* const gate[2], int64_t block,
                  int64_t y_begin, int64_t y_end, float* to, float* temp);
  // The mean over the pixels of one block, [lanes].
  void (*mean)(const float* map, int64_t pixels, float* to);
  // One block of a map times scale plus shift, pixels [begin, end), to channels first or last.
  void (*scaled)(const Geometry&, const float* map, const float* scale, const float* shift,
                 int64_t block, int64_t begin, int64_t end, const Output&, int64_t image,
                 float* temp);
  // So many rounds of independent multiply-adds, for the measure of a machine; how many they are.
  int64_t (*multiply_adds)(Precision, int64_t rounds);
};
constexpr int64_t SCALED_PIXELS = 64;  // at a time; temp: (SCALED_PIXELS + lanes) * lanes floats

}  // namespace casvit
