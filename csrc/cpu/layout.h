// How maps lie in memory and how they are cut into units of work.
//
// q, k and v: [channel block][H + 2][W + 2][lanes] with a zero halo of one pixel, so that the 3x3
// convolutions have no edge cases and every access is a whole vector.
#pragma once

#include <cstdint>

namespace casvit {

enum class DType : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

// Operands of the qkv GEMM; it accumulates in float32. Everything else is float32 whatever the
// dtype of x and out.
enum class Precision : int64_t { F32 = 0, BF16 = 1 };

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

// A map to read, x or grad: any strides, in elements.
struct Input {
  const void* data;
  DType dtype;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// A map to write, out or grad_x: dense, channels first or last.
struct Output {
  void* data;
  DType dtype;
  bool channels_last;
};

// Pixels [begin, end) of a group of images, counted through its images: the rows of a qkv GEMM.
struct PixelRun {
  const Input* x;
  const Geometry* g;
  int64_t image;  // index of the group's first image in x
  int64_t begin, end;
};

// Strips: rectangles of pixels, the unit of work of the spatial gates. They are fixed by the shape
// alone, so that results do not depend on the number of threads.
struct Strips {
  int64_t columns, rows;  // size of one strip
  int64_t across, count;
};
inline Strips make_strips(const Geometry& g, int64_t most = 448) {  // pixels; L1 holds their sums
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
// Output rows that `combine` gathers before it transposes them to channels first: at least 64
// pixels, and whole cache lines where at most 128 pixels make such.
inline int64_t combined_rows(const Geometry& g) {
  int64_t rows = 1;
  while (rows * g.W < 64 || (rows * g.W % 16 != 0 && (rows + 1) * g.W <= 128)) ++rows;
  return rows;
}
inline int64_t combine_temp_floats(const Geometry& g) {
  return 6 * g.row + (combined_rows(g) * g.W + g.lanes) * g.lanes;
}

// Bands of rows: the unit of work of the training kernels, fixed by the problem alone, as strips
// are. Small enough for the L2 cache, and many enough for many threads.
struct Bands {
  int64_t rows, count;
};
inline Bands make_bands(const Geometry& g, int64_t images) {
  const int64_t fit = 65536 / g.row, share = g.H * images * g.blocks / 16;
  Bands b{fit < share ? fit : share, 0};
  if (b.rows < 8) b.rows = 8;  // the halo rows of a band are computed twice
  if (b.rows > g.H) b.rows = g.H;
  b.count = (g.H + b.rows - 1) / b.rows;
  b.rows = (g.H + b.count - 1) / b.count;
  b.count = (g.H + b.rows - 1) / b.rows;
  return b;
}
// `backward_combine` sums products across the lanes for so many pixels at a time.
constexpr int64_t SUMMED_PIXELS = 32;
inline int64_t backward_combine_temp_floats(const Geometry& g, const Bands& b) {
  return (b.rows + 4 + 6) * g.row + 2 * (SUMMED_PIXELS + g.W + g.lanes) * g.lanes;
}
inline int64_t backward_gate_temp_floats(const Geometry& g) {
  const Strips s = make_strips(g);
  return (s.rows * s.columns + g.lanes) * (g.lanes + 3);
}
inline int64_t backward_depthwise_temp_floats(const Geometry& g) { return 3 * g.row; }

}  // namespace casvit
