// BatchNorm's statistics of a batch: of the depthwise convolution of q and of k, the mean and the
// sum of squared differences from it, for each block and channel; then of all blocks.
#pragma once

#include "gates.h"

namespace casvit::cuda {

struct StatisticsArguments {
  Maps maps;
  Cut cut;
  const uint16_t* qkv;
  const uint4* packed;  // without statistics
  float* counts;        // (blocks)
  float* moments;       // (blocks, 2 gates, 2, padded)
  CASVIT_HOST_DEVICE int slices() const { return (maps.chunks() + cut.chunks - 1) / cut.chunks; }
};

CASVIT_HOST_DEVICE uint32_t statistics_shared(const Cut& c, int rows) {
  return c.images * (c.strips * rows + 2) * (c.pairs + 1) * c.unit_stride * kUnitBytes;
}

// Grid: (bands x columns, image groups, 2 gates x slices). Differences are taken from the block's
// first value, so that a mean far from zero costs no digits.
template <class T, int ROWS>
CASVIT_DEVICE void statistics_block(const StatisticsArguments& a) {
  const Maps& m = a.maps;
  const Cut& c = a.cut;
  const PackedLayout layout(m.channels, m.padded);
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int z = block_z() & 1, chunk0 = (block_z() >> 1) * c.chunks;
  const Divisor by_columns(c.columns);
  const int band = by_columns.quotient(block_x()), column = by_columns.remainder(block_x(), band);
  const int all = m.chunks(), chunks = all - chunk0 < c.chunks ? all - chunk0 : c.chunks;
  const int rows = c.strips * ROWS, width = 2 * c.pairs;
  const Box box{c.group() * c.images, band * rows - 1, column * width - 1, c.images, rows + 2,
                c.pairs + 1};
  const uint32_t row_bytes = box.pairs * pair_bytes(c);
  load_tile<ROWS>(a.qkv + z * m.padded, m, c, box, chunk0, chunks, 0, 3 * m.padded);
  copy_commit();
  copy_wait<0>();
  sync_threads();

  const int images = m.images - box.image < c.images ? m.images - box.image : c.images;
  const int height = m.height - band * rows < rows ? m.height - band * rows : rows;
  const int across = m.width - column * width < width ? m.width - column * width : width;
  const float number = static_cast<float>(images * height * across);
  const int block = block_x() + c.bands * c.columns * c.group();
  if (block_z() == 0 && thread_index() == 0) store_global(a.counts + block, number);

  const Positions positions(c.images, c.strips, c.pairs);
  const int tiles = positions.tiles();
#pragma unroll 1
  for (int chunk = warp; chunk < chunks; chunk += kWarps) {
    uint32_t taps[12];
    load_exact_taps(taps, a.packed, z * all + chunk0 + chunk, lane);
    const float4 of = load_constant(reinterpret_cast<const float4*>(a.packed) + layout.gate_rows +
                                    (z * all + chunk0 + chunk) * 2 + (lane & 1));
    const float bias[4] = {of.x, of.z, of.x, of.z};
    float first[2] = {0.0f, 0.0f}, sum[2] = {0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const Position p = positions.at(tile * kPositions + lane % 16);
      const uint32_t address = shared_base() + (p.image * box.rows + p.strip * ROWS) * row_bytes +
                               (p.pair + lane / 16) * pair_bytes(c) + chunk * kUnitBytes;
      int left[2];  // rows of each half's positions that lie in the map
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Position mine = positions.at(tile * kPositions + half * 8 + lane / 4);
        const bool inside =
            mine.valid && mine.image < images && 2 * mine.pair + (lane >> 1 & 1) < across;
        left[half] = inside ? height - mine.strip * ROWS : 0;
      }
      depthwise<T, ROWS, true>(address, row_bytes, taps, bias, [&](int row, const float (&d)[4]) {
        if (row == 0 && tile == 0) {  // position 0, pixel 0: lanes 0 and 1
          first[0] = shuffle(d[0], lane & 1);
          first[1] = shuffle(d[1], lane & 1);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float v = row < left[i / 2] ? d[i] - first[i % 2] : 0.0f;
          sum[i % 2] += v;
          squares[i % 2] = fused_multiply_add(v, v, squares[i % 2]);
        }
      });
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int mask = 2; mask <= 16; mask *= 2) {
        sum[i] += shuffle_xor(sum[i], mask);
        squares[i] += shuffle_xor(squares[i], mask);
      }
    }
    if (lane < 2) {
      float* to = a.moments + (static_cast<int64_t>(block) * 2 + z) * 2 * m.padded +
                  (chunk0 + chunk) * kChunk + lane * 2;
      const float scale[2] = {of.y, of.w};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float mean = sum[i] / number;
        store_global(to + i, (first[i] + mean) * scale[i]);
        const float spread = squares[i] - sum[i] * mean;
        store_global(to + m.padded + i, spread * scale[i] * scale[i]);
      }
    }
  }
}

struct MergeArguments {
  const float *counts, *moments;
  float* statistics;  // (2, 2, C): mean and biased variance
  int blocks, channels, padded;
};

// Grid: (channels / kWarps, 2 gates). A warp merges the blocks' moments of a channel, in a fixed
// order.
CASVIT_DEVICE void merge_block(const MergeArguments& a) {
  const int lane = thread_index() % 32, z = block_y();
  const int channel = block_x() * kWarps + thread_index() / 32;
  if (channel >= a.channels) return;
  const float* mean_of = a.moments + z * 2 * a.padded + channel;
  const int64_t step = 4 * a.padded;
  float number = 0.0f, sum = 0.0f;
  for (int b = lane; b < a.blocks; b += 32) {
    const float count = load_global(a.counts + b);
    number += count;
    sum = fused_multiply_add(count, load_global(mean_of + b * step), sum);
  }
#pragma unroll
  for (int mask = 1; mask <= 16; mask *= 2) {
    number += shuffle_xor(number, mask);
    sum += shuffle_xor(sum, mask);
  }
  const float mean = sum / number;
  float spread = 0.0f, rest = 0.0f;
  for (int b = lane; b < a.blocks; b += 32) {
    const float count = load_global(a.counts + b),
                difference = load_global(mean_of + b * step) - mean;
    rest = fused_multiply_add(count, difference, rest);
    spread += load_global(mean_of + b * step + a.padded);
    spread = fused_multiply_add(count * difference, difference, spread);
  }
#pragma unroll
  for (int mask = 1; mask <= 16; mask *= 2) {
    rest += shuffle_xor(rest, mask);
    spread += shuffle_xor(spread, mask);
  }
  if (lane == 0) {
    const float correction = rest / number;  // what the first sum's rounding left of the mean
    float* to = a.statistics + z * 2 * a.channels + channel;
    store_global(to, mean + correction);
    const float variance = spread / number - correction * correction;
    store_global(to + a.channels, variance < 0.0f ? 0.0f : variance);  // fmaxf would hide a NaN
  }
}

}  // namespace casvit::cuda
