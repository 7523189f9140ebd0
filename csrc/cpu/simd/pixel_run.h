// Where the pixels of a run lie in x and in the planes of q, k and v.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// P pixels of a run. Offsets past its end repeat the last pixel, so that packing needs no edge
// case.
template <int P>
struct PixelGroup {
  int64_t from[P];  // into x, in elements, of channel 0
  int64_t to[P];    // into the planes, in floats, of channel block 0
  int count;
  bool consecutive;  // from[i] == from[0] + i for all P
  int run;           // pixels before the first that does not follow its neighbour in memory
  bool two_runs;     // those from `run` to `count` are consecutive as well

  void locate(const PixelRun& pixel_run, int64_t begin, int64_t image_floats) {
    const Geometry& g = *pixel_run.g;
    const Input& input = *pixel_run.x;
    const int64_t pixels = g.pixels();
    int64_t image = begin / pixels, y = begin % pixels / g.W, x = begin % pixels % g.W;
    count = static_cast<int>(pixel_run.end - begin < P ? pixel_run.end - begin : P);
    int breaks = 0;
    run = count;
    for (int i = 0; i < count;) {  // the rest of a row
      const int n = static_cast<int>(g.W - x < count - i ? g.W - x : count - i);
      const int64_t first = (pixel_run.image + image) * input.batch_stride + y * input.row_stride +
                            x * input.column_stride;
      const int64_t place = image * image_floats + (y + 1) * g.row + (x + 1) * g.lanes;
      if (i > 0 && first != from[i - 1] + 1 && breaks++ == 0) run = i;
      if (n > 1 && input.column_stride != 1) {
        if (breaks == 0) run = i + 1;
        breaks += n - 1;
      }
      for (int j = 0; j < n; ++j) {
        from[i + j] = first + j * input.column_stride;
        to[i + j] = place + j * g.lanes;
      }
      i += n;
      x = 0;
      if (++y == g.H) y = 0, ++image;
    }
    for (int i = count; i < P; ++i) {
      from[i] = from[count - 1];
      to[i] = to[count - 1];
    }
    consecutive = run == P;
    two_runs = breaks <= 1;
  }
};

}  // namespace CASVIT_ISA
}  // namespace casvit
