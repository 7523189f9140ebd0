// B2: from the gradient at the pooled means and the pixels' sums of B1 to the gradient at the
// spatial gate's logit, es, and BatchNorm's two sums: over pixels of es and of es n^, where n > 0.
//
// As gates.h: z in {q, k}, all its channels in a block; a warp owns 16 positions and a share of the
// channels. es lies in registers over all of them.
#pragma once

#include "backward_pack.h"
#include "gates.h"

namespace casvit::cuda {

struct BackwardGateArguments {
  Maps maps;
  Cut cut;
  const uint16_t* qkv;
  const uint4* packed;   // of BackwardLayout
  const float* spatial;  // (B, 2, H, W)
  const float* pixel;    // (B, 2, H, W)
  const float* shift;    // (2, B, C), the gradient at the pooled mean, by pixel
  float* logit;          // (B, 2, H, W), es
  float* sums;           // (blocks, 2 gates, 2, padded)
};

struct BackwardGateShared {
  int tiles, groups, pixels;
  uint32_t shift, logit, sums, bytes;
  CASVIT_HOST_DEVICE BackwardGateShared(const Maps& m, const Cut& c, int rows) {
    tiles = (c.images * c.strips * c.pairs + kPositions - 1) / kPositions;
    groups = kWarps / tiles;
    pixels = c.images * c.strips * rows * c.pairs * 2;
    shift = c.images * (c.strips * rows + 2) * (c.pairs + 1) * c.unit_stride * kUnitBytes;
    logit = shift + c.images * m.padded * 4;
    sums = logit + pixels * 4;
    bytes = sums + tiles * m.padded * 2 * 4;
  }
};

template <class T, int ROWS>
CASVIT_DEVICE void backward_gate_block(const BackwardGateArguments& a) {
  const Maps& m = a.maps;
  const Cut& c = a.cut;
  const BackwardGateShared shared(m, c, ROWS);
  const BackwardLayout layout(m.padded);
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, z = block_z();
  const Divisor by_columns(c.columns);
  const int band = by_columns.quotient(block_x()), column = by_columns.remainder(block_x(), band);
  const int chunks = m.chunks(), rows = c.strips * ROWS, width = 2 * c.pairs;
  const int map = m.height * m.width;
  const Box box{c.group() * c.images, band * rows - 1, column * width - 1, c.images, rows + 2,
                c.pairs + 1};
  const uint32_t row_bytes = box.pairs * pair_bytes(c);
  load_tile<ROWS>(a.qkv + z * m.padded, m, c, box, 0, chunks, 0, 3 * m.padded);
  copy_commit();
  for (int i = thread; i < c.images * m.padded; i += kThreads) {
    const int image = i / m.padded, channel = i - image * m.padded;
    const bool there = channel < m.channels && box.image + image < m.images;
    store_shared(
        shared.shift + i * 4,
        there ? load_constant(
                    a.shift +
                    (static_cast<int64_t>(z) * m.images + box.image + image) * m.channels + channel)
              : 0.0f);
  }
  copy_wait<0>();
  sync_threads();

  const Divisor by_width(width), by_rows(rows);
  for (int i = thread; i < shared.pixels; i += kThreads) {
    const int line = by_width.quotient(i), x = by_width.remainder(i, line);
    const int image = by_rows.quotient(line), row = by_rows.remainder(line, image);
    const int y = band * rows + row, global_x = column * width + x;
    float es = 0.0f;
    if (y < m.height && global_x < m.width && box.image + image < m.images) {
      const int64_t at =
          (static_cast<int64_t>(box.image + image) * 2 + z) * map + y * m.width + global_x;
      const float s = load_constant(a.spatial + at);
      float t = load_constant(a.pixel + at);
      uint32_t from = (image * box.rows + row + 1) * row_bytes + ((x + 1) >> 1) * pair_bytes(c) +
                      ((x + 1) & 1) * 8;
      uint32_t by = shared.shift + image * m.padded * 4;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const uint2 v = load_shared<uint2>(from);
        const float4 w = load_shared<float4>(by);
        t = fused_multiply_add(low2<T>(v.x), w.x, t);
        t = fused_multiply_add(high2<T>(v.x), w.y, t);
        t = fused_multiply_add(low2<T>(v.y), w.z, t);
        t = fused_multiply_add(high2<T>(v.y), w.w, t);
        from += kUnitBytes;
        by += kUnitBytes;
      }
      es = t * s * (1.0f - s);
      store_global(a.logit + at, es);
    }
    store_shared(shared.logit + i * 4, es);
  }
  sync_threads();

  const Positions positions(c.images, c.strips, c.pairs);
  const int tiles = positions.tiles();
  const Divisor by_tiles(tiles);
  const int group = by_tiles.quotient(warp), tile = by_tiles.remainder(warp, group);
  if (group < shared.groups) {
    const Position p = positions.at(tile * kPositions + lane % 16);
    const uint32_t address = shared_base() + (p.image * box.rows + p.strip * ROWS) * row_bytes +
                             (p.pair + lane / 16) * pair_bytes(c);
    float es[ROWS][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Position mine = positions.at(tile * kPositions + half * 8 + lane / 4);
      const int first =
          ((mine.image * c.strips + mine.strip) * ROWS * c.pairs + mine.pair) * 2 + (lane >> 1 & 1);
#pragma unroll
      for (int row = 0; row < ROWS; ++row)
        es[row][half] =
            mine.valid ? load_shared<float>(shared.logit + (first + row * width) * 4) : 0.0f;
    }
    const Divisor by_groups(shared.groups);
    const int last = by_groups.quotient((group + 1) * chunks);
#pragma unroll 1
    for (int chunk = by_groups.quotient(group * chunks); chunk < last; ++chunk) {
      uint32_t taps[12];
      load_exact_taps(taps, a.packed, z * chunks + chunk, lane);
      const float4* of = reinterpret_cast<const float4*>(a.packed) + layout.gate_rows +
                         z * m.padded + chunk * kChunk + (lane & 1) * 2;
      const float4 first = load_constant(of), second = load_constant(of + 1);
      const float bias[4] = {first.x, second.x, first.x, second.x};
      float open[2] = {0.0f, 0.0f}, weighted[2] = {0.0f, 0.0f};
      depthwise<T, ROWS, true>(address + chunk * kUnitBytes, row_bytes, taps, bias,
                               [&](int row, const float (&d)[4]) {
#pragma unroll
                                 for (int i = 0; i < 4; ++i) {
                                   const float4& channel = i % 2 ? second : first;
                                   const float n = fused_multiply_add(d[i], channel.z, channel.w);
                                   const float e = n <= 0.0f ? 0.0f : es[row][i / 2];  // NaN stays
                                   open[i % 2] += e;
                                   weighted[i % 2] = fused_multiply_add(e, d[i], weighted[i % 2]);
                                 }
                               });
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int mask = 2; mask <= 16; mask *= 2) {
          open[i] += shuffle_xor(open[i], mask);
          weighted[i] += shuffle_xor(weighted[i], mask);
        }
      if (lane < 2) {
        const uint32_t to = shared.sums + (tile * 2 * m.padded + chunk * kChunk + lane * 2) * 4;
        store_shared(to, float2{open[0], open[1]});
        store_shared(to + m.padded * 4, float2{weighted[0] * first.y, weighted[1] * second.y});
      }
    }
  }
  sync_threads();

  float* sums =
      a.sums +
      (static_cast<int64_t>(block_x() + c.bands * c.columns * c.group()) * 2 + z) * 2 * m.padded;
  for (int i = thread; i < 2 * m.padded; i += kThreads) {
    float sum = 0.0f;
    for (int t = 0; t < tiles; ++t)
      sum += load_shared<float>(shared.sums + (t * 2 * m.padded + i) * 4);
    store_global(sums + i, sum);
  }
}

}  // namespace casvit::cuda
