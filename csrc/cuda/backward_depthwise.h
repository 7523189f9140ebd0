// B3: the gradient at z in {q, k}, and those of its gate's depthwise convolution.
//
//   gd = c0 gn + c1 + c2 n^, gn = es spatial_weight where n > 0
//   gz = (ga g + shift) s + transposed depthwise of gd
//
// A block takes a slice of channels of one gate and the whole width. Tiles: z, two rows and columns
// more than the block's own on each side; gd, with one, zero outside of the map. The convolution's
// part of gz takes the place of z.
#pragma once

#include "backward_combine.h"

namespace casvit::cuda {

struct BackwardDepthwiseArguments {
  Maps maps;
  Cut cut;
  const uint16_t* qkv;
  const uint4* packed;        // of BackwardLayout
  const float* spatial;       // (B, 2, H, W)
  const float* logit;         // (B, 2, H, W), es
  const float* gates;         // (2, B, C), the channel gates
  const float* shift;         // (2, B, C)
  const float* coefficients;  // (2, 3, C)
  const uint16_t* grad_sum;   // (B, H, W, padded), ga
  uint16_t* grad_qkv;         // (B, H, W, 3 padded): the parts of q and k are written
  float* weights;             // (bands x image groups, 2, 10, padded): taps, bias
};

struct BackwardDepthwiseShared {
  CombineShared forward;
  int groups, columns;
  uint32_t gd, zeros, logit, taps, sums, bytes;
  CASVIT_HOST_DEVICE BackwardDepthwiseShared(const Maps& m, const Cut& c, int rows, bool halo)
      : forward(m, c, rows, halo) {
    const uint32_t pair = c.unit_stride * kUnitBytes;
    groups = c.chunks < kWarps ? kWarps / c.chunks : 1;
    columns = 2 * (c.pairs + 1);
    gd = c.images * forward.a_rows * (c.pairs + 2) * pair;
    zeros = gd + c.images * forward.u_rows * (c.pairs + 1) * pair;
    logit = zeros + kUnitBytes;
    taps = (logit + c.images * forward.u_rows * columns * 4 + 15) / 16 * 16;
    sums = taps + groups * c.chunks * kChunk * 2 * 9 * 4;
    bytes = sums + 2 * c.pairs * c.chunks * kUnitBytes;
  }
};

template <class T, int ROWS, bool HALO>
CASVIT_DEVICE void backward_depthwise_block(const BackwardDepthwiseArguments& a) {
  constexpr int U_ROWS = HALO ? ROWS + 1 : ROWS;
  const Maps& m = a.maps;
  const Cut& c = a.cut;
  const BackwardDepthwiseShared shared(m, c, ROWS, HALO);
  const CombineShared& of = shared.forward;
  const BackwardLayout layout(m.padded);
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, all = m.chunks();
  const int image0 = c.group() * c.images, row0 = block_x() * of.own_rows;
  const int z = block_z() & 1, chunk0 = (block_z() >> 1) * c.chunks;
  const int chunks = all - chunk0 < c.chunks ? all - chunk0 : c.chunks;
  const int images = m.images - image0 < c.images ? m.images - image0 : c.images;
  const int map = m.height * m.width;
  const Box u_box{image0, row0 - 1, -1, c.images, of.u_rows, c.pairs + 1};
  const Box z_box{image0, row0 + of.first_a, -2, c.images, of.a_rows, c.pairs + 2};
  const uint32_t z_row = z_box.pairs * pair_bytes(c), u_row = u_box.pairs * pair_bytes(c);

  load_tile<ROWS>(a.qkv + z * m.padded, m, c, z_box, chunk0, chunks, 0, 3 * m.padded);
  copy_commit();
  if (thread == 0) store_shared(shared.zeros, uint4{0, 0, 0, 0});
  if (!HALO)
    for (int i = thread; i < c.images * 2 * static_cast<int>(u_row) / 16; i += kThreads) {
      const int row = i / static_cast<int>(u_row / 16), image = row / 2;
      store_shared(shared.gd + (image * of.u_rows + (row & 1) * (of.u_rows - 1)) * u_row +
                       (i - row * static_cast<int>(u_row / 16)) * 16,
                   uint4{0, 0, 0, 0});
    }
  const Divisor by_width(shared.columns), by_rows(of.u_rows);
  for (int i = thread; i < c.images * of.u_rows * shared.columns; i += kThreads) {
    const int line = by_width.quotient(i), x = by_width.remainder(i, line) - 1;
    const int image = by_rows.quotient(line), y = row0 + by_rows.remainder(line, image) - 1;
    const bool inside = x >= 0 && x < m.width && y >= 0 && y < m.height && image < images;
    const int64_t at = (static_cast<int64_t>(image0 + image) * 2 + z) * map +
                       static_cast<int64_t>(y) * m.width + x;
    store_shared(shared.logit + i * 4, inside ? load_constant(a.logit + at) : 0.0f);
  }
  copy_wait<0>();
  sync_threads();

  const int first_row = HALO ? 0 : 1;
  {
    const Positions positions(c.images, c.strips, u_box.pairs);
    const int tiles = positions.tiles();
    const Divisor by_tiles(tiles);
    const int groups = tiles < kWarps ? by_tiles.quotient(kWarps) : 1;
    const int group = by_tiles.quotient(warp);
#pragma unroll 1
    for (int tile = by_tiles.remainder(warp, group); tile < tiles && group < groups;
         tile += kWarps) {
      const Position p = positions.at(tile * kPositions + lane % 16);
      const uint32_t address = shared_base() + (p.image * of.a_rows + p.strip * U_ROWS) * z_row +
                               (p.pair + lane / 16) * pair_bytes(c);
      uint32_t to[2], es[2];
      int top[2], bottom[2];  // rows of the sweep that lie in the map
      bool valid[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Position mine = positions.at(tile * kPositions + half * 8 + lane / 4);
        const int row = first_row + mine.strip * U_ROWS, x = 2 * mine.pair - 1 + (lane >> 1 & 1),
                  y = row0 + row - 1;
        const bool inside = mine.valid && mine.image < images && x >= 0 && x < m.width;
        valid[half] = mine.valid;
        to[half] = shared.gd + (mine.image * of.u_rows + row) * u_row + mine.pair * pair_bytes(c) +
                   lane % 4 * 4;
        es[half] = shared.logit + ((mine.image * of.u_rows + row) * shared.columns + x + 1) * 4;
        top[half] = inside ? -y : 1 << 20;
        bottom[half] = inside ? m.height - y : 0;
      }
#pragma unroll 1
      for (int chunk = group; chunk < chunks; chunk += groups) {
        uint32_t taps[12];
        load_exact_taps(taps, a.packed, z * all + chunk0 + chunk, lane);
        const int channel = (chunk0 + chunk) * kChunk + (lane & 1) * 2;
        const float4* rows =
            reinterpret_cast<const float4*>(a.packed) + layout.gate_rows + z * m.padded + channel;
        const float4 row_of[2] = {load_constant(rows), load_constant(rows + 1)};
        const float* spatial =
            reinterpret_cast<const float*>(a.packed + layout.spatial) + z * m.padded + channel;
        float by_es[2], constant[2], by_d[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* at = a.coefficients + static_cast<int64_t>(z) * 3 * m.channels + channel + i;
          const bool there = channel + i < m.channels;
          by_es[i] = there ? load_constant(at) * load_constant(spatial + i) : 0.0f;
          constant[i] = there ? load_constant(at + m.channels) : 0.0f;
          by_d[i] = there ? load_constant(at + 2 * m.channels) * row_of[i].y : 0.0f;
        }
        const float bias[4] = {row_of[0].x, row_of[1].x, row_of[0].x, row_of[1].x};
        depthwise<T, U_ROWS, true>(
            address + chunk * kUnitBytes, z_row, taps, bias, [&](int row, const float (&d)[4]) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                if (!valid[half]) continue;
                const float e = load_shared<float>(es[half] + row * shared.columns * 4);
                float gd[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  const float v = d[2 * half + i],
                              n = fused_multiply_add(v, row_of[i].z, row_of[i].w);
                  const float smooth = fused_multiply_add(v, by_d[i], constant[i]);
                  gd[i] = n <= 0.0f ? smooth : fused_multiply_add(e, by_es[i], smooth);
                }
                const bool inside = row >= top[half] && row < bottom[half];
                store_shared(to[half] + row * u_row + chunk * kUnitBytes,
                             inside ? pack2<T>(gd[0], gd[1]) : 0u);
              }
            });
      }
    }
  }
  sync_threads();

  const int group = warp / c.chunks, own_chunk = warp % c.chunks;
#pragma unroll 1
  for (int chunk = own_chunk; chunk < chunks && group < shared.groups; chunk += kWarps) {
    sum_positions<T, ROWS>(c, u_box.pairs, chunk, group, shared.groups,
                           {0, z_row, of.a_rows, -1 - of.first_a, 0},
                           {shared.gd, u_row, of.u_rows, 1, 0}, shared.zeros,
                           shared.taps + (group * c.chunks + chunk) * kTapsBytes);
  }
  sync_threads();

  float* weights = a.weights +
                   (static_cast<int64_t>(block_x() + c.bands * c.group()) * 2 + z) * 10 * m.padded +
                   chunk0 * kChunk;
  for (int i = thread; i < chunks * 9 * kChunk; i += kThreads) {
    const int chunk = i / (9 * kChunk), rest = i - chunk * 9 * kChunk;
    const float sum =
        sum_groups(shared.taps + chunk * kTapsBytes, rest, shared.groups, c.chunks * kTapsBytes);
    store_global(weights + rest / kChunk * m.padded + chunk * kChunk + rest % kChunk, sum);
  }
  const uint32_t out_row = c.pairs * pair_bytes(c);
  convolve<T, ROWS>(
      m, a.packed, layout.conv_taps, kDepthwiseTurned + z, -1, chunk0, chunks, c, shared.gd,
      of.u_rows, u_box.pairs, 0, of.own_rows, c.pairs, c.pairs,
      [&](const uint32_t (&first)[2], const bool (&valid)[2], int row, const float (&d)[4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (valid[half])
            store_shared(first[half] + row * out_row, pack2<T>(d[2 * half], d[2 * half + 1]));
      });
  sync_threads();

  const int granules = 2 * c.pairs * c.chunks;
  const int left = m.height - row0, rows = left < of.own_rows ? left : of.own_rows;
  const int64_t row_step = static_cast<int64_t>(m.width) * m.padded;
  const Divisor by_chunks(c.chunks);
#pragma unroll 1
  for (int g = thread; g < granules; g += kThreads) {
    const int x = by_chunks.quotient(g), chunk = by_chunks.remainder(g, x);
    const int channel = (chunk0 + chunk) * kChunk;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const bool active = chunk < chunks && x < m.width;
    const uint32_t own = (x >> 1) * pair_bytes(c) + chunk * kUnitBytes + (x & 1) * 8;
    const uint32_t in_gd = ((x + 1) >> 1) * pair_bytes(c) + chunk * kUnitBytes + ((x + 1) & 1) * 8;
#pragma unroll 1
    for (int image = 0; active && image < images; ++image) {
      float by[4], shift[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at =
            (static_cast<int64_t>(z) * m.images + image0 + image) * m.channels + channel + i;
        by[i] = channel + i < m.channels ? load_constant(a.gates + at) : 0.0f;
        shift[i] = channel + i < m.channels ? load_constant(a.shift + at) : 0.0f;
      }
      const int64_t first = (static_cast<int64_t>(image0 + image) * m.height + row0) * m.width + x;
      const float* s = a.spatial + (static_cast<int64_t>(image0 + image) + z) * map + first;
      const uint16_t* ga_from = a.grad_sum + first * m.padded + channel;
      uint16_t* to = a.grad_qkv + first * (3 * m.padded) + z * m.padded + channel;
      uint32_t conv_at = image * of.own_rows * out_row + own;
      uint32_t gd_at = shared.gd + (image * of.u_rows + 1) * u_row + in_gd;
#pragma unroll 2
      for (int row = 0; row < rows; ++row) {
        const uint2 conv = load_shared<uint2>(conv_at), gd = load_shared<uint2>(gd_at);
        const uint2 ga = load_constant(reinterpret_cast<const uint2*>(ga_from));
        const float gate = load_constant(s);
        const float gas[4] = {low2<T>(ga.x), high2<T>(ga.x), low2<T>(ga.y), high2<T>(ga.y)};
        const float convs[4] = {low2<T>(conv.x), high2<T>(conv.x), low2<T>(conv.y),
                                high2<T>(conv.y)};
        const float gds[4] = {low2<T>(gd.x), high2<T>(gd.x), low2<T>(gd.y), high2<T>(gd.y)};
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = fused_multiply_add(fused_multiply_add(gas[i], by[i], shift[i]), gate, convs[i]);
          sums[i] += gds[i];
        }
        store_global(reinterpret_cast<uint2*>(to),
                     uint2{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])});
        conv_at += out_row, gd_at += u_row;
        ga_from += row_step, to += 3 * row_step, s += m.width;
      }
    }
    store_shared(shared.sums + g * kUnitBytes, float4{sums[0], sums[1], sums[2], sums[3]});
  }
  sync_threads();

  for (int i = thread; i < chunks * kChunk; i += kThreads) {
    const int chunk = i / kChunk;
    float sum = 0.0f;
    for (int x = 0; x < 2 * c.pairs; ++x)
      sum += load_shared<float>(shared.sums + (x * c.chunks + chunk) * kUnitBytes + i % kChunk * 4);
    store_global(weights + 9 * m.padded + i, sum);
  }
}

}  // namespace casvit::cuda
