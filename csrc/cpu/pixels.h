// Where the pixels of a run lie in x and in scratch.
#pragma once

#include "mixer.h"
#include "vec.h"

namespace casvit {
namespace CASVIT_ISA {

// Walks a run in pieces of P pixels. Offsets past the end of the run repeat its last pixel, so that
// packing need not care.
template <int P>
struct Piece {
  int64_t from[P];  // into x, in elements, of channel 0
  int64_t to[P];    // into the planes, in floats, of channel block 0
  int count;
  bool consecutive;  // from[i] == from[0] + i for all P

  void locate(const PixelRun& run, int64_t begin, int64_t image_floats) {
    const Geometry& g = *run.g;
    const int64_t pixels = g.pixels();
    int64_t image = begin / pixels, y = begin % pixels / g.W, x = begin % pixels % g.W;
    count = static_cast<int>(run.end - begin < P ? run.end - begin : P);
    consecutive = count == P;
    for (int i = 0; i < P; ++i) {
      if (i < count) {
        from[i] = (run.image + image) * run.x->batch_stride + y * run.x->row_stride +
                  x * run.x->column_stride;
        to[i] = image * image_floats + (y + 1) * g.row + (x + 1) * g.lanes;
        if (++x == g.W) {
          x = 0;
          if (++y == g.H) y = 0, ++image;
        }
      } else {
        from[i] = from[count - 1];
        to[i] = to[count - 1];
      }
      consecutive = consecutive && from[i] == from[0] + i;
    }
  }
};

}  // namespace CASVIT_ISA
}  // namespace casvit
