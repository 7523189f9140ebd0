// The channel gates, and from them out = proj(dwc(a) v), a = sum over z in {q, k} of z s g.
//
// Channels do not meet here, so a block takes a slice of them. Tiles in shared memory: a, with two
// rows and columns more than out on each side, then u = dwc(a) v in the place of v, with one, then
// out in the place of a. Outside of the map v is zero, and so is u, as the second convolution's
// padding asks.
#pragma once

#include "gates.h"

namespace casvit::cuda {

struct CombineArguments {
  Maps maps;
  Cut cut;
  const uint16_t* qkv;
  const uint4* packed;
  const float* spatial;  // (B, 2, H, W)
  const float* sums;     // (parts, 2, B, padded), of the gates' kernel
  int parts;
  float* pooled;   // (2, B, C) or null
  float* channel;  // (2, B, C) or null
  uint16_t* out;   // (B, C, H, W), channels_last or contiguous
  bool channels_last;
};

// HALO: rows above and below the block's own belong to other blocks of the map. Otherwise it holds
// all rows, and those of u outside of the map are zero as v is.
struct CombineShared {
  int own_rows;  // of out
  int first_a;   // of a, from the first row of out
  int a_rows, u_rows;
  int mean_words;  // of an image and gate, two channels each: rounded, then what that left over
  uint32_t u, means, gates, bytes;
  CASVIT_HOST_DEVICE CombineShared(const Maps& m, const Cut& c, int rows, bool halo) {
    own_rows = c.strips * rows;
    first_a = halo ? -2 : -1;
    a_rows = own_rows + (halo ? 4 : 2);
    u_rows = own_rows + 2;
    const uint32_t pair = c.unit_stride * kUnitBytes;
    u = c.images * a_rows * (c.pairs + 2) * pair;
    means = u + c.images * u_rows * (c.pairs + 1) * pair;
    mean_words = (m.channels + 15) / 16 * 8 + 4;  // rows of an A operand meet no bank twice
    gates = means + 2 * c.images * 2 * mean_words * 4;
    bytes = gates + 2 * c.images * c.chunks * kChunk * 4;
  }
};

// q sq gq + k sk gk of four channels of a pixel. In bfloat16 on packed words: each gate is rounded
// once, and each product, one rounding less than PyTorch does. Products of gates may be too small
// for float16.
template <class T>
CASVIT_DEVICE uint2 gated(uint2 q, uint2 k, const float (&gq)[4], const float (&gk)[4], float sq,
                          float sk) {
  const auto two = [&](uint32_t q2, uint32_t k2, int i) {
    if constexpr (__is_same(T, Bf16)) {
      const uint32_t by_q = pack2<T>(gq[i] * sq, gq[i + 1] * sq);
      const uint32_t by_k = pack2<T>(gk[i] * sk, gk[i + 1] * sk);
      return fused_multiply_add2(q2, by_q, fused_multiply_add2(k2, by_k, 0u));
    } else {
      const float first = fused_multiply_add(low2<T>(q2) * gq[i], sq, low2<T>(k2) * gk[i] * sk);
      const float second =
          fused_multiply_add(high2<T>(q2) * gq[i + 1], sq, high2<T>(k2) * gk[i + 1] * sk);
      return pack2<T>(first, second);
    }
  };
  return {two(q.x, k.x, 0), two(q.y, k.y, 2)};
}

// Means of all channels as the product below takes them, two of a word: rounded, and what that
// leaves over in the `mean_words` behind; also out to `pooled` unless it is null. sum(z, image of
// the block's, channel): the sums over the pixels of that channel and the next.
template <class T, class Sum>
CASVIT_DEVICE void make_means(const Maps& m, const Cut& c, uint32_t means, int mean_words,
                              float* pooled, int image0, int images, Sum&& sum) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int words = PackedLayout(m.channels, m.padded).channel_steps * 8;
  const float scale = 1.0f / (static_cast<float>(m.height) * static_cast<float>(m.width));
  for (int line = warp; line < 2 * images; line += kWarps) {
    const int z = line >= images, image = line - z * images;
    const uint32_t to = means + (z * c.images + image) * 2 * mean_words * 4;
    for (int word = lane; word < words; word += 32) {
      float2 two{0.0f, 0.0f};
      if (2 * word < m.padded) two = sum(z, image, 2 * word);
      const float first = two.x * scale, second = two.y * scale;
      const uint32_t rounded = pack2<T>(first, second);
      store_shared(to + word * 4, rounded);
      store_shared(to + (mean_words + word) * 4,
                   pack2<T>(first - low2<T>(rounded), second - high2<T>(rounded)));
      if (pooled) {
        float* out =
            pooled + (static_cast<int64_t>(z) * m.images + image0 + image) * m.channels + 2 * word;
        if (2 * word < m.channels) store_global(out, first);
        if (2 * word + 1 < m.channels) store_global(out + 1, second);
      }
    }
  }
}

// The gates of the block's channels and images from these means, (2, images of the cut, 2,
// mean_words), into shared memory as (2, images of the cut, channels of the cut); also out to
// `channel` unless it is null. A product on tensor cores, rows of A being images: both factors are
// rounded, and what that leaves over of either counts, too.
template <class T>
CASVIT_DEVICE void channel_gates(const Maps& m, const Cut& c, const uint4* packed, uint32_t means,
                                 int mean_words, uint32_t gates, float* channel_out, int image0,
                                 int images, int chunk0, int chunks) {
  const PackedLayout layout(m.channels, m.padded);
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int first_tile_of_8 = chunk0 / 2, tiles = (chunk0 + chunks - 1) / 2 - first_tile_of_8 + 1;
  const int image = lane / 4 < images ? lane / 4 : images - 1;  // row of A
#pragma unroll 1
  for (int task = warp; task < 2 * tiles; task += kWarps) {
    const int z = task >= tiles, tile = first_tile_of_8 + task - z * tiles;
    const uint4* weights =
        packed + layout.channel +
        static_cast<int64_t>(z * layout.channel_tiles + tile) * layout.channel_steps * 32 + lane;
    uint32_t from = means + ((z * c.images + image) * 2 * mean_words + lane % 4) * 4;
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int step = 0; step < layout.channel_steps; ++step) {
      const uint4 w = load_constant(weights + step * 32);
      const uint32_t words[2] = {w.x, w.y}, rests[2] = {w.z, w.w};
      const uint32_t mean[4] = {load_shared<uint32_t>(from), 0u, load_shared<uint32_t>(from + 16),
                                0u};
      const uint32_t rest[4] = {load_shared<uint32_t>(from + mean_words * 4), 0u,
                                load_shared<uint32_t>(from + mean_words * 4 + 16), 0u};
      mma<T>(d, mean, words);
      mma<T>(d, mean, rests);
      mma<T>(d, rest, words);
      from += 32;
    }
    const int channel = tile * 8 + lane % 4 * 2, index = channel - chunk0 * kChunk;
    if (lane / 4 < images && index >= 0 && index < chunks * kChunk) {
      const float g[2] = {sigmoid(d[0]), sigmoid(d[1])};
      store_shared(gates + ((z * c.images + image) * c.chunks * kChunk + index) * 4,
                   float2{g[0], g[1]});
      if (channel_out)
        for (int i = 0; i < 2 && channel + i < m.channels; ++i)
          store_global(channel_out +
                           (static_cast<int64_t>(z) * m.images + image0 + image) * m.channels +
                           channel + i,
                       g[i]);
    }
  }
}

// The block's channel gates from the sums of the gates' kernel; some blocks write means and gates
// out, too.
template <class T>
CASVIT_DEVICE void gates_of_sums(const CombineArguments& a, const CombineShared& shared, int image0,
                                 int chunk0, int chunks, bool first_tile, bool first_slice) {
  const Maps& m = a.maps;
  const Cut& c = a.cut;
  const int images = m.images - image0 < c.images ? m.images - image0 : c.images;
  make_means<T>(
      m, c, shared.means, shared.mean_words, first_tile && first_slice ? a.pooled : nullptr, image0,
      images, [&](int z, int image, int channel) {
        const float* from =
            a.sums + (static_cast<int64_t>(z) * m.images + image0 + image) * m.padded + channel;
        float2 sum{0.0f, 0.0f};
#pragma unroll 4
        for (int part = 0; part < a.parts; ++part) {
          const float2 two = load_constant(reinterpret_cast<const float2*>(from));
          sum.x += two.x;
          sum.y += two.y;
          from += static_cast<int64_t>(2 * m.images) * m.padded;
        }
        return sum;
      });
  sync_threads();
  channel_gates<T>(m, c, a.packed, shared.means, shared.mean_words, shared.gates,
                   first_tile ? a.channel : nullptr, image0, images, chunk0, chunks);
}

// a = q sq gq + k sk gk into its tile, zero outside of the map.
template <class T, int ROWS>
CASVIT_DEVICE void make_a(const CombineArguments& a, const Cut& c, uint32_t gates, uint32_t tile,
                          const Box& box, int chunk0, int chunks) {
  const Maps& m = a.maps;
  const int map = m.height * m.width;
  const int64_t row_stride = static_cast<int64_t>(3) * m.padded * m.width;
  float gq[4], gk[4];
  const uint16_t *q_from = a.qkv, *k_from = a.qkv;
  const float *sq_from = a.spatial, *sk_from = a.spatial;
  walk<ROWS>(
      m, c, box, chunks,
      [&](int image, int local, int chunk, int pixel) {
        if (local >= m.images - box.image) local = 0;  // there is no such image: outside, all of it
        const uint32_t from = gates + (local * c.chunks + chunk) * kUnitBytes;
        const float4 q = load_shared<float4>(from);
        const float4 k = load_shared<float4>(from + c.images * c.chunks * kUnitBytes);
        gq[0] = q.x, gq[1] = q.y, gq[2] = q.z, gq[3] = q.w;
        gk[0] = k.x, gk[1] = k.y, gk[2] = k.z, gk[3] = k.w;
        q_from = a.qkv + static_cast<int64_t>(pixel) * (3 * m.padded) + (chunk0 + chunk) * kChunk;
        k_from = q_from + m.padded;
        sq_from = a.spatial + static_cast<int64_t>(image) * map + pixel;  // (B, 2, H, W)
        sk_from = sq_from + map;
      },
      [&](uint32_t to, bool inside) {
        uint2 q_word{0, 0}, k_word{0, 0};
        float sq = 0.0f, sk = 0.0f;
        if (inside) {
          q_word = load_constant(reinterpret_cast<const uint2*>(q_from));
          k_word = load_constant(reinterpret_cast<const uint2*>(k_from));
          sq = load_constant(sq_from);
          sk = load_constant(sk_from);
        }
        q_from += row_stride, k_from += row_stride, sq_from += m.width, sk_from += m.width;
        store_shared(tile + to, gated<T>(q_word, k_word, gq, gk, sq, sk));
      });
}

// One convolution of the block, from a tile of `source_rows` rows of `source_pairs` pairs for each
// image; its bias is at `bias_at` of the packed words, or there is none: at(first, valid, row, c),
// first being the offsets of this lane's words of its two positions in row 0 of a tile of `to_rows`
// rows of `to_pitch` pairs, of which `to_pairs` are made.
template <class T, int ROWS, class At>
CASVIT_DEVICE void convolve(const Maps& m, const uint4* packed, int64_t conv_taps, int conv,
                            int64_t bias_at, int chunk0, int chunks, const Cut& c, uint32_t source,
                            int source_rows, int source_pairs, uint32_t to, int to_rows,
                            int to_pairs, int to_pitch, At&& at) {
  const int lane = thread_index() % 32, warp = thread_index() / 32, all = m.chunks();
  const Positions positions(c.images, c.strips, to_pairs);
  const int tiles = positions.tiles();
  const uint32_t row_bytes = source_pairs * pair_bytes(c);
  const Divisor by_tiles(tiles);
  const int groups = tiles < kWarps ? by_tiles.quotient(kWarps) : 1;
  const int group = by_tiles.quotient(warp);
  if (group >= groups) return;
#pragma unroll 1
  for (int tile = by_tiles.remainder(warp, group); tile < tiles; tile += kWarps) {
    const Position p = positions.at(tile * kPositions + lane % 16);
    const uint32_t address = shared_base() + source +
                             (p.image * source_rows + p.strip * ROWS) * row_bytes +
                             (p.pair + lane / 16) * pair_bytes(c);
    uint32_t lane_to[2];
    bool valid[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Position mine = positions.at(tile * kPositions + half * 8 + lane / 4);
      lane_to[half] =
          to + ((mine.image * to_rows + mine.strip * ROWS) * to_pitch + mine.pair) * pair_bytes(c) +
          lane % 4 * 4;
      valid[half] = mine.valid;
    }
#pragma unroll 1
    for (int chunk = group; chunk < chunks; chunk += groups) {
      uint32_t taps[6];
      load_taps(taps, packed, conv_taps, conv * all + chunk0 + chunk, lane);
      const float2 b = bias_at < 0
                           ? float2{0.0f, 0.0f}
                           : load_constant(reinterpret_cast<const float2*>(packed + bias_at) +
                                           (chunk0 + chunk) * 2 + (lane & 1));
      const float bias[4] = {b.x, b.y, b.x, b.y};
      const uint32_t first[2] = {lane_to[0] + chunk * kUnitBytes, lane_to[1] + chunk * kUnitBytes};
      depthwise<T, ROWS, false>(address + chunk * kUnitBytes, row_bytes, taps, bias,
                                [&](int row, const float (&d)[4]) { at(first, valid, row, d); });
    }
  }
}

// A box of the result from its tile to the maps; what lies outside of them is left out.
template <int ROWS>
CASVIT_DEVICE void store_tile(uint16_t* out, bool channels_last, const Maps& m, const Cut& c,
                              const Box& box, int chunk0, int chunks, uint32_t tile) {
  if (channels_last) {
    const int64_t row_stride = static_cast<int64_t>(m.channels) * m.width;
    uint16_t* to = out;
    int count = 0;  // of channels, fewer in the last chunk
    const auto begin = [&](int, int, int chunk, int pixel) {
      const int channel = (chunk0 + chunk) * kChunk;
      count = m.channels - channel;
      to = out + static_cast<int64_t>(pixel) * m.channels + channel;
    };
    if (m.channels % kChunk == 0) {
      walk<ROWS>(m, c, box, chunks, begin, [&](uint32_t from, bool inside) {
        if (inside) store_global(reinterpret_cast<uint2*>(to), load_shared<uint2>(tile + from));
        to += row_stride;
      });
    } else {
      walk<ROWS>(m, c, box, chunks, begin, [&](uint32_t from, bool inside) {
        if (inside)
          for (int i = 0; i < kChunk && i < count; ++i)
            store_global(to + i, load_shared<uint16_t>(tile + from + 2 * i));
        to += row_stride;
      });
    }
    return;
  }
  // Rows of pixels of a channel: neighbouring threads write neighbouring pixels.
  const int width = 2 * box.pairs, lines = box.images * box.rows;
  const uint32_t row_bytes = box.pairs * pair_bytes(c);
  const Divisor by_rows(box.rows);
  const int left = m.channels - chunk0 * kChunk,
            own = chunks * kChunk < left ? chunks * kChunk : left;
  for (int i = thread_index(); i < own * lines * width; i += kThreads) {
    const int column = i % width, rest = i / width, line = rest % lines, channel = rest / lines;
    const int local = by_rows.quotient(line), row = box.row + by_rows.remainder(line, local);
    const int image = box.image + local, x = box.x + column;
    if (image >= m.images || row >= m.height || x < 0 || x >= m.width) continue;
    const uint32_t from = line * row_bytes + (column >> 1) * pair_bytes(c) +
                          channel / kChunk * kUnitBytes + (column & 1) * 8 + channel % kChunk * 2;
    store_global(
        out +
            ((static_cast<int64_t>(image) * m.channels + chunk0 * kChunk + channel) * m.height +
             row) *
                m.width +
            x,
        load_shared<uint16_t>(tile + from));
  }
}

// Grid: (bands x columns, image groups, slices). ROWS: of out in a strip; HALO: see CombineShared.
template <class T, int ROWS, bool HALO>
CASVIT_DEVICE void combine_block(const CombineArguments& a) {
  constexpr int U_ROWS =
      HALO ? ROWS + 1 : ROWS;  // two strips: so they make the rows above and below
  const Maps& m = a.maps;
  const Cut& c = a.cut;
  const CombineShared shared(m, c, ROWS, HALO);
  const PackedLayout layout(m.channels, m.padded);
  const Divisor by_columns(c.columns);
  const int band = by_columns.quotient(block_x()), column = by_columns.remainder(block_x(), band);
  const int image0 = c.group() * c.images, row0 = band * shared.own_rows, x0 = column * 2 * c.pairs;
  const int chunk0 = block_z() * c.chunks;
  const int chunks = m.chunks() - chunk0 < c.chunks ? m.chunks() - chunk0 : c.chunks;
  const Box u_box{image0, row0 - 1, x0 - 1, c.images, shared.u_rows, c.pairs + 1};
  const Box a_box{image0, row0 + shared.first_a, x0 - 2, c.images, shared.a_rows, c.pairs + 2};

  load_tile<ROWS>(a.qkv + 2 * m.padded, m, c, u_box, chunk0, chunks, shared.u, 3 * m.padded);
  copy_commit();
  gates_of_sums<T>(a, shared, image0, chunk0, chunks, block_x() == 0, block_z() == 0);
  sync_threads();
  make_a<T, ROWS>(a, c, shared.gates, 0, a_box, chunk0, chunks);
  copy_wait<0>();
  sync_threads();

  // u = dwc(a) v. Its pixels are those of its tile, a pixel left of out: a's tile is a pixel
  // further.
  const uint32_t u_row_bytes = u_box.pairs * pair_bytes(c);
  const int first_row = HALO ? 0 : 1;
  convolve<T, U_ROWS>(
      m, a.packed, layout.conv_taps, 0, layout.conv_bias, chunk0, chunks, c, 0, shared.a_rows,
      a_box.pairs, shared.u + first_row * u_row_bytes, shared.u_rows, u_box.pairs, u_box.pairs,
      [&](const uint32_t (&first)[2], const bool (&valid)[2], int row, const float (&l)[4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t at = first[half] + row * u_row_bytes;
          const uint32_t v = valid[half] ? load_shared<uint32_t>(at) : 0u;
          const uint32_t u = pack2<T>(l[2 * half] * low2<T>(v), l[2 * half + 1] * high2<T>(v));
          if (valid[half]) store_shared(at, u);
        }
      });
  sync_threads();

  const uint32_t out_row_bytes = c.pairs * pair_bytes(c);
  convolve<T, ROWS>(
      m, a.packed, layout.conv_taps, 1, layout.conv_bias + m.chunks(), chunk0, chunks, c, shared.u,
      shared.u_rows, u_box.pairs, 0, shared.own_rows, c.pairs, c.pairs,
      [&](const uint32_t (&first)[2], const bool (&valid)[2], int row, const float (&d)[4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (valid[half])
            store_shared(first[half] + row * out_row_bytes, pack2<T>(d[2 * half], d[2 * half + 1]));
      });
  sync_threads();

  store_tile<ROWS>(a.out, a.channels_last, m, c,
                   Box{image0, row0, x0, c.images, shared.own_rows, c.pairs}, chunk0, chunks, 0);
}

}  // namespace casvit::cuda
