// B1: from the gradient at out to those at v and at a, and of dwc and proj. (DESIGN: B1 of three
// passes.)
//
//   l = dwc(a), gu = transposed proj of the gradient, u = l v, gl = gu v, gv = gu l,
//   ga = transposed dwc of gl; then by pixel the sum over channels of ga g z, by channel the sum
//   over pixels of ga z s, for z in {q, k}.
//
// A block takes a slice of 1, 2, 4 or 8 chunks, and the whole width: outside of the map v is zero,
// so that u and gl are. Tiles: a and the gradient, two rows and columns more than the block's own
// on each side; v, then u in its place, and gl, with one. ga takes the place of a.
#pragma once

#include "backward_pack.h"
#include "combine.h"

namespace casvit::cuda {

struct BackwardCombineArguments {
  CombineArguments forward;  // maps, qkv, spatial
  Cut cut;
  const uint4* packed;   // of BackwardLayout
  const float* gates;    // (2, B, C), the channel gates
  const uint16_t* grad;  // (B, H, W, padded)
  uint16_t* grad_qkv;    // (B, H, W, 3 padded): the part of v is written
  uint16_t* grad_sum;    // (B, H, W, padded): ga
  float* pixel;          // (slices, B, 2, H, W)
  float* channel_sums;   // (bands, 2, B, padded)
  float* weights;        // (bands x image groups, 20, padded): dwc's taps, bias, proj's taps, bias
};

constexpr int kColumnSums =
    16;  // of a column of pixels: four channels of ga z s for q, k; grad; gl

struct BackwardCombineShared {
  CombineShared forward;
  uint32_t grad, u, gl, zeros, gates, taps, sums, bytes;
  int groups;  // of warps that share a chunk's pixels
  CASVIT_HOST_DEVICE BackwardCombineShared(const Maps& m, const Cut& c, int rows, bool halo)
      : forward(m, c, rows, halo) {
    const uint32_t pair = c.unit_stride * kUnitBytes;
    const uint32_t wide = c.images * forward.a_rows * (c.pairs + 2) * pair;
    const uint32_t narrow = c.images * forward.u_rows * (c.pairs + 1) * pair;
    groups = c.chunks < kWarps ? kWarps / c.chunks : 1;
    grad = wide;
    u = 2 * wide;
    gl = u + narrow;
    zeros = gl + narrow;
    gates = zeros + kUnitBytes;
    taps = gates + 2 * c.images * c.chunks * kChunk * 4;
    bytes = taps + groups * c.chunks * kChunk * 2 * 18 * 4;
    const uint32_t columns = c.images * 2 * c.pairs * c.chunks * kColumnSums * 4;
    sums = columns <= narrow ? u : bytes;  // u is no longer needed then, gl is
    if (sums == bytes) bytes += columns;
  }
};

// Where the taps' gradient reads a tile: the row above the block's own for an input, its first own
// row for a gradient.
struct TapsFrom {
  uint32_t tile, row_bytes;
  int rows, first, pair;  // rows of an image; the first one read; pairs before the first
};

constexpr uint32_t kTapsBytes = 9 * kChunk * 2 * 4;  // of a chunk, for both pixels of a pair

// The gradient of one chunk's taps, by a warp, over every `groups`th tile of positions from `group`
// on; to shared memory.
template <class T, int ROWS>
CASVIT_DEVICE void sum_positions(const Cut& c, int pairs, int chunk, int group, int groups,
                                 const TapsFrom& input, const TapsFrom& gradient, uint32_t zeros,
                                 uint32_t to) {
  const int lane = thread_index() % 32;
  const Positions positions(c.images, c.strips, pairs);
  float sums[3][4] = {};
#pragma unroll 1
  for (int tile = group; tile < positions.tiles(); tile += groups) {
    const Position p = positions.at(tile * kPositions + lane % 8 + lane / 16 * 8);
    const Position q = positions.at(tile * kPositions + lane % 16);
    const uint32_t from = input.tile +
                          (p.image * input.rows + input.first + p.strip * ROWS) * input.row_bytes +
                          (p.pair + input.pair + lane / 8 % 2) * pair_bytes(c) + chunk * kUnitBytes;
    const uint32_t at =
        gradient.tile +
        (q.image * gradient.rows + gradient.first + q.strip * ROWS) * gradient.row_bytes +
        (q.pair + gradient.pair) * pair_bytes(c) + chunk * kUnitBytes;
    depthwise_gradient<T, ROWS>(sums, shared_base() + from, input.row_bytes,
                                shared_base() + (q.valid ? at : zeros),
                                q.valid ? gradient.row_bytes : 0);
  }
#pragma unroll
  for (int dy = 0; dy < 3; ++dy)
    taps_of(sums[dy], lane, [&](int dx, int channel, int pixel, float v) {
      store_shared(to + (((dy * 3 + dx) * kChunk + channel) * 2 + pixel) * 4, v);
    });
}

// What the groups have summed of a tap, both pixels: element i of a chunk's, `stride` bytes apart.
CASVIT_DEVICE float sum_groups(uint32_t from, int i, int groups, uint32_t stride) {
  float sum = 0.0f;
  for (int g = 0; g < groups; ++g) {
    const float2 two = load_shared<float2>(from + g * stride + i * 8);
    sum += two.x + two.y;
  }
  return sum;
}

template <class T, int ROWS, bool HALO>
CASVIT_DEVICE void backward_combine_block(const BackwardCombineArguments& b) {
  constexpr int U_ROWS = HALO ? ROWS + 1 : ROWS;
  const CombineArguments& a = b.forward;
  const Maps& m = a.maps;
  const Cut& c = b.cut;
  const BackwardCombineShared shared(m, c, ROWS, HALO);
  const CombineShared& of = shared.forward;
  const BackwardLayout layout(m.padded);
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, all = m.chunks();
  const int band = block_x(), image0 = c.group() * c.images, row0 = band * of.own_rows;
  const int chunk0 = block_z() * c.chunks;
  const int chunks = all - chunk0 < c.chunks ? all - chunk0 : c.chunks;
  const int images = m.images - image0 < c.images ? m.images - image0 : c.images;
  const Box u_box{image0, row0 - 1, -1, c.images, of.u_rows, c.pairs + 1};
  const Box a_box{image0, row0 + of.first_a, -2, c.images, of.a_rows, c.pairs + 2};
  const uint32_t a_row = a_box.pairs * pair_bytes(c), u_row = u_box.pairs * pair_bytes(c);

  load_tile<ROWS>(a.qkv + 2 * m.padded, m, c, u_box, chunk0, chunks, shared.u, 3 * m.padded);
  load_tile<ROWS>(b.grad, m, c, a_box, chunk0, chunks, shared.grad, m.padded);
  copy_commit();
  for (int i = thread; i < 2 * c.images * c.chunks * kChunk; i += kThreads) {
    const int line = i / (c.chunks * kChunk), index = i - line * c.chunks * kChunk;
    const int z = line >= c.images, image = line - z * c.images;
    const int channel = chunk0 * kChunk + index;
    const bool there = image < images && channel < m.channels;
    store_shared(
        shared.gates + i * 4,
        there ? load_constant(b.gates +
                              (static_cast<int64_t>(z) * m.images + image0 + image) * m.channels +
                              channel)
              : 0.0f);
  }
  if (thread == 0) store_shared(shared.zeros, uint4{0, 0, 0, 0});
  // gl's rows that no sweep writes, above and below the map, are zero.
  if (!HALO)
    for (int i = thread; i < c.images * 2 * static_cast<int>(u_row) / 16; i += kThreads) {
      const int row = i / static_cast<int>(u_row / 16), image = row / 2;
      store_shared(shared.gl + (image * of.u_rows + (row & 1) * (of.u_rows - 1)) * u_row +
                       (i - row * static_cast<int>(u_row / 16)) * 16,
                   uint4{0, 0, 0, 0});
    }
  sync_threads();
  make_a<T, ROWS>(a, c, shared.gates, 0, a_box, chunk0, chunks);
  copy_wait<0>();
  sync_threads();

  // l and gu of the same positions, side by side.
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
      const uint32_t at =
          (p.image * of.a_rows + p.strip * U_ROWS) * a_row + (p.pair + lane / 16) * pair_bytes(c);
      uint32_t to[2];
      uint16_t* gv[2];
      int top[2], bottom[2];  // rows of the sweep whose gv is the block's own
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Position mine = positions.at(tile * kPositions + half * 8 + lane / 4);
        const int row = first_row + mine.strip * U_ROWS, x = 2 * mine.pair - 1 + (lane >> 1 & 1);
        to[half] =
            (mine.image * of.u_rows + row) * u_row + mine.pair * pair_bytes(c) + lane % 4 * 4;
        const bool own = mine.valid && mine.image < images && x >= 0 && x < m.width;
        const int y = row - 1;  // from the block's first own row
        const int left = m.height - row0 < of.own_rows ? m.height - row0 : of.own_rows;
        top[half] = own ? -y : 1 << 20;
        bottom[half] = own ? left - y : 0;
        gv[half] =
            b.grad_qkv +
            (static_cast<int64_t>((image0 + mine.image) * m.height + row0 + y) * m.width + x) *
                (3 * m.padded) +
            2 * m.padded + chunk0 * kChunk + (lane & 1) * 2;
        if (!mine.valid) to[half] = ~0u;
      }
      const int64_t gv_row = static_cast<int64_t>(3 * m.padded) * m.width;
#pragma unroll 1
      for (int chunk = group; chunk < chunks; chunk += groups) {
        uint32_t taps[6], turned[6];
        load_taps(taps, b.packed, layout.conv_taps, kDwc * all + chunk0 + chunk, lane);
        load_taps(turned, b.packed, layout.conv_taps, kProjTurned * all + chunk0 + chunk, lane);
        const float2 of_bias =
            load_constant(reinterpret_cast<const float2*>(b.packed + layout.bias) +
                          (chunk0 + chunk) * 2 + (lane & 1));
        const float bias[4] = {of_bias.x, of_bias.y, of_bias.x, of_bias.y}, none[4] = {};
        const uint32_t source = shared_base() + at + chunk * kUnitBytes;
        uint32_t x[3][4], y[3][4], from = source;
        ldmatrix_x4(x[0], from);
        ldmatrix_x4(y[0], from + shared.grad);
        from += a_row;
        ldmatrix_x4(x[1], from);
        ldmatrix_x4(y[1], from + shared.grad);
#pragma unroll
        for (int row = 0; row < U_ROWS; ++row) {
          from += a_row;
          ldmatrix_x4(x[(row + 2) % 3], from);
          ldmatrix_x4(y[(row + 2) % 3], from + shared.grad);
          float l[4], gu[4];
          mma<T>(l, x[row % 3], taps, bias);
          mma<T>(gu, y[row % 3], turned, none);
          mma<T>(l, x[(row + 1) % 3], taps + 2);
          mma<T>(gu, y[(row + 1) % 3], turned + 2);
          mma<T>(l, x[(row + 2) % 3], taps + 4);
          mma<T>(gu, y[(row + 2) % 3], turned + 4);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (to[half] == ~0u) continue;
            const uint32_t word = to[half] + row * u_row + chunk * kUnitBytes;
            const uint32_t v = load_shared<uint32_t>(shared.u + word);
            const float l0 = l[2 * half], l1 = l[2 * half + 1], g0 = gu[2 * half],
                        g1 = gu[2 * half + 1];
            store_shared(shared.u + word, pack2<T>(l0 * low2<T>(v), l1 * high2<T>(v)));
            store_shared(shared.gl + word, pack2<T>(g0 * low2<T>(v), g1 * high2<T>(v)));
            if (row >= top[half] && row < bottom[half])
              store_global(reinterpret_cast<uint32_t*>(gv[half] + row * gv_row + chunk * kChunk),
                           pack2<T>(g0 * l0, g1 * l1));
          }
        }
      }
    }
  }
  sync_threads();

  // Gradients of the taps: dwc from a and gl, whose pairs are a pixel left of the block's own; proj
  // from u and the gradient. A chunk's positions are shared by the warps of its group.
  const int group = warp / c.chunks, own_chunk = warp % c.chunks;
#pragma unroll 1
  for (int chunk = own_chunk; chunk < chunks && group < shared.groups; chunk += kWarps) {
    const uint32_t to = shared.taps + (group * c.chunks + chunk) * 2 * kTapsBytes;
    sum_positions<T, ROWS>(c, u_box.pairs, chunk, group, shared.groups,
                           {0, a_row, of.a_rows, -1 - of.first_a, 0},
                           {shared.gl, u_row, of.u_rows, 1, 0}, shared.zeros, to);
    sum_positions<T, ROWS>(
        c, c.pairs, chunk, group, shared.groups, {shared.u, u_row, of.u_rows, 0, 0},
        {shared.grad, a_row, of.a_rows, -of.first_a, 1}, shared.zeros, to + kTapsBytes);
  }
  sync_threads();

  float* weights = b.weights +
                   static_cast<int64_t>(block_x() + c.bands * c.group()) * 20 * m.padded +
                   chunk0 * kChunk;
  for (int i = thread; i < chunks * 18 * kChunk; i += kThreads) {
    const int chunk = i / (18 * kChunk), rest = i - chunk * 18 * kChunk, tap = rest / kChunk;
    const float sum = sum_groups(shared.taps + chunk * 2 * kTapsBytes, rest, shared.groups,
                                 c.chunks * 2 * kTapsBytes);
    store_global(weights + (tap + tap / 9) * m.padded + chunk * kChunk + rest % kChunk, sum);
  }

  // ga, in the place of a.
  const uint32_t out_row = c.pairs * pair_bytes(c);
  convolve<T, ROWS>(
      m, b.packed, layout.conv_taps, kDwcTurned, -1, chunk0, chunks, c, shared.gl, of.u_rows,
      u_box.pairs, 0, of.own_rows, c.pairs, c.pairs,
      [&](const uint32_t (&first)[2], const bool (&valid)[2], int row, const float (&d)[4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (valid[half])
            store_shared(first[half] + row * out_row, pack2<T>(d[2 * half], d[2 * half + 1]));
      });
  sync_threads();

  // Out, with the sums that need it. The threads of a pixel's chunks are neighbours.
  const int map = m.height * m.width, granules = 2 * c.pairs * c.chunks;
  float* pixel = b.pixel + static_cast<int64_t>(block_z()) * m.images * 2 * map;
  const int left = m.height - row0, rows = left < of.own_rows ? left : of.own_rows;
  const int64_t row_step = static_cast<int64_t>(m.width) * m.padded;
  const Divisor by_chunks(c.chunks);
#pragma unroll 1
  for (int g0 = 0; g0 < granules; g0 += kThreads) {
    const int g = g0 + thread, x = by_chunks.quotient(g), chunk = by_chunks.remainder(g, x);
    const int channel = (chunk0 + chunk) * kChunk;
    const bool active = g < granules && chunk < chunks && x < m.width;
    const uint32_t own = (x >> 1) * pair_bytes(c) + chunk * kUnitBytes + (x & 1) * 8;
    const uint32_t in_gl = ((x + 1) >> 1) * pair_bytes(c) + chunk * kUnitBytes + ((x + 1) & 1) * 8;
#pragma unroll 1
    for (int image = 0; image < c.images; ++image) {
      float sums[kColumnSums] = {};
      const int64_t at = (static_cast<int64_t>(image0 + image) * m.height + row0) * m.width + x;
      const uint32_t gates = shared.gates + (image * c.chunks + (active ? chunk : 0)) * kUnitBytes;
      const float4 gq = load_shared<float4>(gates);
      const float4 gk = load_shared<float4>(gates + c.images * c.chunks * kUnitBytes);
      const bool inside = active && image < images;
      const uint16_t* qkv = a.qkv + at * (3 * m.padded) + channel;
      uint16_t* grad_sum = b.grad_sum + at * m.padded + channel;
      const float* s = a.spatial + static_cast<int64_t>(image0 + image) * map + at;
      float* sums_of_pixel = pixel + static_cast<int64_t>(image0 + image) * map + at;
      uint32_t ga_at = image * of.own_rows * out_row + own;
      uint32_t gl_at = shared.gl + (image * of.u_rows + 1) * u_row + in_gl;
      uint32_t go_at = shared.grad + (image * of.a_rows - of.first_a) * a_row + pair_bytes(c) + own;
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        float of_q = 0.0f, of_k = 0.0f;
        if (inside) {
          const uint2 ga = load_shared<uint2>(ga_at), gl = load_shared<uint2>(gl_at);
          const uint2 go = load_shared<uint2>(go_at);
          store_global(reinterpret_cast<uint2*>(grad_sum), ga);
          const uint2 q = load_constant(reinterpret_cast<const uint2*>(qkv));
          const uint2 k = load_constant(reinterpret_cast<const uint2*>(qkv + m.padded));
          const float sq = load_constant(s), sk = load_constant(s + map);
          const float gas[4] = {low2<T>(ga.x), high2<T>(ga.x), low2<T>(ga.y), high2<T>(ga.y)};
          const float qs[4] = {low2<T>(q.x), high2<T>(q.x), low2<T>(q.y), high2<T>(q.y)};
          const float ks[4] = {low2<T>(k.x), high2<T>(k.x), low2<T>(k.y), high2<T>(k.y)};
          const float gos[4] = {low2<T>(go.x), high2<T>(go.x), low2<T>(go.y), high2<T>(go.y)};
          const float gls[4] = {low2<T>(gl.x), high2<T>(gl.x), low2<T>(gl.y), high2<T>(gl.y)};
          const float gqs[4] = {gq.x, gq.y, gq.z, gq.w}, gks[4] = {gk.x, gk.y, gk.z, gk.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float by_q = gas[i] * qs[i], by_k = gas[i] * ks[i];
            of_q = fused_multiply_add(by_q, gqs[i], of_q);
            of_k = fused_multiply_add(by_k, gks[i], of_k);
            sums[i] = fused_multiply_add(by_q, sq, sums[i]);
            sums[4 + i] = fused_multiply_add(by_k, sk, sums[4 + i]);
            sums[8 + i] += gos[i];
            sums[12 + i] += gls[i];
          }
        }
        for (int mask = 1; mask < c.chunks; mask *= 2) {
          of_q += shuffle_xor(of_q, mask);
          of_k += shuffle_xor(of_k, mask);
        }
        if (inside && chunk == 0) {
          store_global(sums_of_pixel, of_q);
          store_global(sums_of_pixel + map, of_k);
        }
        ga_at += out_row, gl_at += u_row, go_at += a_row;
        grad_sum += row_step, qkv += 3 * row_step, s += m.width, sums_of_pixel += m.width;
      }
      if (active) {
        const uint32_t to =
            shared.sums + ((image * 2 * c.pairs + x) * c.chunks + chunk) * kColumnSums * 4;
#pragma unroll
        for (int i = 0; i < kColumnSums; i += 4)
          store_shared(to + i * 4, float4{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]});
      }
    }
  }
  sync_threads();

  const int columns = m.width;  // all of them: there is one block across
  for (int i = thread; i < chunks * kColumnSums; i += kThreads) {
    const int chunk = i / kColumnSums, which = i - chunk * kColumnSums, kind = which / kChunk;
    const int channel = (chunk0 + chunk) * kChunk + which % kChunk;
    float total = 0.0f;
    for (int image = 0; image < images; ++image) {
      float sum = 0.0f;
      for (int x = 0; x < columns; ++x)
        sum += load_shared<float>(
            shared.sums +
            (((image * 2 * c.pairs + x) * c.chunks + chunk) * kColumnSums + which) * 4);
      if (kind < 2)
        store_global(
            b.channel_sums +
                ((static_cast<int64_t>(band) * 2 + kind) * m.images + image0 + image) * m.padded +
                channel,
            sum);
      total += sum;
    }
    if (kind >= 2)
      store_global(weights + (kind == 2 ? 19 : 9) * m.padded + chunk * kChunk + which % kChunk,
                   total);
  }
}

}  // namespace casvit::cuda
