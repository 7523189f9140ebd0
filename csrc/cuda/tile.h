// A block's part of the maps, and the ways between global memory and units in shared memory.
#pragma once

#include "depthwise.h"

namespace casvit::cuda {

// The maps of a call. qkv is channels_last with 3 `padded` channels a pixel: q, k and v, each of
// `channels` and zeros up to a multiple of 4.
struct Maps {
  int images, channels, padded, height, width;
  CASVIT_HOST_DEVICE int chunks() const { return padded / kChunk; }
};

// How a kernel cuts them. A block takes `images` images x `strips` strips of the kernel's rows x
// `pairs` pairs of pixels x `chunks` chunks of channels.
constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;

#ifdef CASVIT_EMULATED
inline int most_groups = 65535;  // less in a test
#else
constexpr int most_groups = 65535;
#endif

struct Cut {
  int images, strips, pairs, chunks;
  int bands, columns;   // blocks down and across a map
  int unit_stride;      // units from a pair to the next: odd, so that ldmatrix meets no bank twice
  int first_group = 0;  // of images, of this launch: a grid has at most `most_groups` down
  CASVIT_DEVICE int group() const { return first_group + block_y(); }
};

// Division of what is below 2^16 by what is the same for a whole block: a multiplication. The
// inverse, 2^32 / d, may be too large by 2^-17 of itself before a quotient is wrong, and must not
// be too small: the fast reciprocal, which is off by 2^-22 at most, and 2^-20 more.
class Divisor {
 public:
  CASVIT_DEVICE explicit Divisor(int d) : Divisor(d, fast_reciprocal(static_cast<float>(d))) {}
  CASVIT_DEVICE Divisor(int d, float reciprocal)
      : d_(d), inverse_(static_cast<uint32_t>(4294971392.0f * reciprocal) + 1) {}
  CASVIT_DEVICE int quotient(int n) const {
    return d_ == 1 ? n : static_cast<int>(static_cast<uint64_t>(n) * inverse_ >> 32);
  }
  CASVIT_DEVICE int remainder(int n, int quotient) const { return n - quotient * d_; }

 private:
  int d_;
  uint32_t inverse_;
};

// Pixels, rows and channels of a tile in shared memory, halo included.
struct Box {
  int image, row, x;        // the first, may lie outside of the map
  int images, rows, pairs;  // how many
};

CASVIT_DEVICE uint32_t pair_bytes(const Cut& c) {
  return static_cast<uint32_t>(c.unit_stride * kUnitBytes);
}

// Visits each pixel and chunk of a box that this thread takes: begin(image, image in the box,
// chunk, pixel) before the rows of an image, where pixel is the index of the column's first one in
// the maps and may lie outside; then at(offset in shared memory, inside) for each row. A thread
// keeps one column and chunk and walks down, so that pointers only grow by a row; where the next
// ROWS are all inside, without a question for each.
template <int ROWS, class Begin, class At>
CASVIT_DEVICE void walk(const Maps& m, const Cut& c, const Box& box, int chunk_count, Begin&& begin,
                        At&& at) {
  const uint32_t row_bytes = box.pairs * pair_bytes(c);
  const int across = chunk_count < kThreads ? chunk_count : kThreads;
  const Divisor by_across(across);
  const int step = by_across.quotient(kThreads), first = by_across.quotient(thread_index());
  const int end = box.row + box.rows;
  if (first >= step) return;
#pragma unroll 1
  for (int chunk = thread_index() - first * across; chunk < chunk_count; chunk += across) {
#pragma unroll 1
    for (int column = first; column < 2 * box.pairs; column += step) {
      const int x = box.x + column;
      uint32_t offset =
          (column >> 1) * pair_bytes(c) + chunk * kUnitBytes + (column & 1) * (kUnitBytes / 2);
#pragma unroll 1
      for (int i = 0; i < box.images; ++i) {
        const int image = box.image + i;
        const bool there = x >= 0 && x < m.width && image < m.images;
        const int height = there ? m.height : 0, last = (end < height ? end : height) - ROWS;
        begin(image < m.images ? image : m.images - 1, i, chunk,
              (image * m.height + box.row) * m.width + x);
        int row = box.row;
#pragma unroll 1
        while (row < end) {
          if (row >= 0 && row <= last) {
#pragma unroll
            for (int next = 0; next < ROWS; ++next, offset += row_bytes) at(offset, true);
            row += ROWS;
          } else {
            at(offset, row >= 0 && row < height);
            offset += row_bytes;
            ++row;
          }
        }
      }
    }
  }
}

// Starts copies of a box of a map whose pixels are `pixel_stride` elements apart, 3 padded for q, k
// and v; what lies outside of the map becomes zero.
template <int ROWS>
CASVIT_DEVICE void load_tile(const uint16_t* map, const Maps& m, const Cut& c, const Box& box,
                             int chunk0, int chunk_count, uint32_t to, int pixel_stride) {
  const uint32_t base = shared_base() + to;
  const int64_t row_stride = static_cast<int64_t>(pixel_stride) * m.width;
  const uint16_t* from = map;
  walk<ROWS>(
      m, c, box, chunk_count,
      [&](int, int, int chunk, int pixel) {
        from = map + static_cast<int64_t>(pixel) * pixel_stride + (chunk0 + chunk) * kChunk;
      },
      [&](uint32_t offset, bool inside) {
        copy_async<8>(base + offset, from, inside);
        from += row_stride;
      });
}

// Where the mma positions of a block lie.
struct Position {
  int image, strip, pair;
  bool valid;
};
class Positions {
 public:
  CASVIT_DEVICE Positions(int images, int strips, int pairs)
      : by_pairs_(pairs), by_strips_(strips), count_(images * strips * pairs) {}
  CASVIT_DEVICE int tiles() const { return (count_ + kPositions - 1) / kPositions; }
  // What lies behind the last one counts as the last one, but is not valid.
  CASVIT_DEVICE Position at(int index) const {
    const bool valid = index < count_;
    index = valid ? index : count_ - 1;
    const int line = by_pairs_.quotient(index), image = by_strips_.quotient(line);
    return {image, by_strips_.remainder(line, image), by_pairs_.remainder(index, line), valid};
  }

 private:
  Divisor by_pairs_, by_strips_;
  int count_;
};

}  // namespace casvit::cuda
