// The mixer after its qkv product in one launch: q, k and v are read once, out is written once.
//
// A cluster of blocks owns a group of images. A block owns a band of their rows and a slice of
// their channels, in shared memory from the first read to the last write. What it needs of others
// it reads there: rows around its band, logits of other slices, sums of other bands. So no row is
// read or computed twice. Two tiles of the same size: q, then a, then out; k, then v, then u.
//
// Pairs of pixels start where an mma's inputs have to, a pixel left of what it makes: those of q
// and a at pixel -1, those of v and u at -2. In the latter tile the first pair of a row, zeros, is
// also the one right of the row above.
#pragma once

#include "combine.h"

namespace casvit::cuda {

struct SinglePassArguments {
  Maps maps;
  Cut cut;  // columns: 1, pairs: half the width
  const uint16_t* qkv;
  const uint4* packed;
  float *spatial, *pooled, *channel;  // (B, 2, H, W), (2, B, C) twice; or null
  uint16_t* out;                      // (B, C, H, W), channels_last or contiguous
  bool channels_last;
};

// What a block keeps in shared memory, the same for each block of a cluster: the tiles, logits and
// from them spatial gates, sums of the channels, then what makes the channel gates.
struct SinglePassShared {
  int slices, own_rows, tile_rows;
  int pairs;         // of a row of either tile
  int units_padded;  // of an image's own rows, to whole steps of the sums
  int mean_words;
  uint32_t row_bytes, u, logits, spatial, sums, means, gates, bytes;
  CASVIT_HOST_DEVICE SinglePassShared(const Maps& m, const Cut& c, int rows) {
    slices = (m.chunks() + c.chunks - 1) / c.chunks;
    own_rows = c.strips * rows;
    tile_rows = own_rows + 2;
    pairs = c.pairs + 1;
    units_padded = (own_rows * pairs + 31) / 32 * 32;
    mean_words = (m.channels + 15) / 16 * 8 + 4;  // rows of an A operand meet no bank twice
    row_bytes = pairs * c.unit_stride * kUnitBytes;
    const uint32_t floats = 2 * c.images * 2 * units_padded;
    u = c.images * tile_rows * row_bytes;
    logits = 2 * u + c.unit_stride * kUnitBytes;  // behind the pair right of the last row
    // Other slices read logits while this block makes gates of them.
    spatial = logits + (slices > 1 ? floats * 4 : 0);
    sums = spatial + floats * 4;
    means = sums + 2 * c.images * c.chunks * kChunk * 4;
    gates = means + 2 * c.images * 2 * mean_words * 4;
    bytes = gates + 2 * c.images * c.chunks * kChunk * 4;
  }
};

// Where a block stands in its cluster.
struct Rank {
  int band, slice, bands, slices;
  CASVIT_DEVICE int of(int other_band, int other_slice) const {
    return other_band * slices + other_slice;
  }
  CASVIT_DEVICE bool alone() const { return bands * slices == 1; }
};

// All that the cluster's blocks wrote before is seen after.
CASVIT_DEVICE void meet(const Rank& rank) {
  if (rank.alone()) sync_threads();
  else cluster_sync();
}

// Fills the rows above and below the block's own with its neighbours', zeros at the maps' ends.
// Nothing to do where a block has all rows: these are zero from the start.
CASVIT_DEVICE void exchange_rows(const SinglePassShared& shared, const Rank& rank, uint32_t tile) {
  if (rank.bands == 1) return;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int band = rank.band + 2 * below - 1;
    const uint32_t from = tile + (below ? 1 : shared.own_rows) * shared.row_bytes;
    const uint32_t to = tile + (below ? shared.own_rows + 1 : 0) * shared.row_bytes;
    const bool there = band >= 0 && band < rank.bands;
    const int other = rank.of(there ? band : rank.band, rank.slice);
#pragma unroll 2
    for (uint32_t i = thread_index() * 16; i < shared.row_bytes; i += kThreads * 16) {
      uint4 value{0, 0, 0, 0};
      if (there) value = load_cluster_shared<uint4>(other, from + i);
      store_shared(to + i, value);
    }
  }
}

// Zeros: spatial gates outside of the map, the pair right of the last row, and, as neighbours take
// whole rows, in these the units between one pair and the next.
CASVIT_DEVICE void fill_gaps(const Cut& c, const SinglePassShared& shared, int chunks) {
  for (int i = thread_index(); i < c.images * shared.units_padded; i += kThreads)
    store_shared(shared.spatial + i * 16, uint4{0, 0, 0, 0});
  for (int i = thread_index(); i < c.unit_stride; i += kThreads)
    store_shared(2 * shared.u + i * kUnitBytes, uint4{0, 0, 0, 0});
  if (c.bands == 1 || chunks == c.unit_stride) return;
  const Divisor by_pairs(shared.pairs);
  for (int i = thread_index(); i < 4 * shared.pairs; i += kThreads) {
    const int line = by_pairs.quotient(i), pair = by_pairs.remainder(i, line);
    const uint32_t row =
        (line & 2 ? shared.u : 0) + (line & 1 ? shared.own_rows : 1) * shared.row_bytes;
    for (int chunk = chunks; chunk < c.unit_stride; ++chunk)
      store_shared(row + pair * pair_bytes(c) + chunk * kUnitBytes, uint4{0, 0, 0, 0});
  }
}

struct Pixel {
  int image, y, x;
};
CASVIT_DEVICE bool is_inside(const Maps& m, const Pixel& p) {
  return p.image < m.images && p.y < m.height && p.x >= 0 && p.x < m.width;
}

// A pixel's spatial gate of q or k from its logit: a word of s rounded and what that left over;
// those outside of the map stay zero. `spatial` takes it, too.
template <class T>
CASVIT_DEVICE void store_gate(const SinglePassArguments& a, const SinglePassShared& shared,
                              const Rank& rank, uint32_t offset, int z, const Pixel& at,
                              float logit) {
  const Maps& m = a.maps;
  const float s = sigmoid(logit);
  const uint32_t rounded = pack2<T>(s, 0.0f);
  store_shared(shared.spatial + offset, rounded | pack2<T>(0.0f, s - low2<T>(rounded)));
  if (a.spatial && rank.slice == 0)
    store_global(
        a.spatial + ((static_cast<int64_t>(at.image) * 2 + z) * m.height + at.y) * m.width + at.x,
        s);
}

// Logits of q and k over the block's channels: floats (2, images, 2, units_padded), of a pair's
// first and second pixel. Where it has all channels, the gates at once.
template <class T, int ROWS>
CASVIT_DEVICE void logits_of_slice(const SinglePassArguments& a, const SinglePassShared& shared,
                                   const Rank& rank, int image0, int row0, int chunk0, int chunks) {
  const Cut& c = a.cut;
  const int lane = thread_index() % 32, warp = thread_index() / 32, all = a.maps.chunks();
  const PackedLayout layout(a.maps.channels, a.maps.padded);
  const Positions positions(c.images, c.strips, c.pairs);
  // Where there are fewer tiles than warps, groups of warps share the channels.
  const int tiles = positions.tiles(), tasks = 2 * tiles;
  const Divisor by_tasks(tasks);
  const int groups = tasks < kWarps ? by_tasks.quotient(kWarps) : 1;
  const int group = groups > 1 ? by_tasks.quotient(warp) : 0;
  const Divisor by_groups(groups);
  const int first = by_groups.quotient(group * chunks);
  const int last = by_groups.quotient((group + 1) * chunks);
#pragma unroll 1
  for (int task = warp - group * tasks; task < tasks; task += kWarps) {
    const int z = task >= tiles, tile = task - z * tiles;
    const Position p = positions.at(tile * kPositions + lane % 16);
    const uint32_t address = shared_base() + z * shared.u +
                             (p.image * shared.tile_rows + p.strip * ROWS) * shared.row_bytes +
                             (p.pair + lane / 16) * pair_bytes(c);
    float logits[ROWS][2];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) logits[row][0] = logits[row][1] = 0.0f;
    add_logits<T, ROWS>(logits, a.packed, layout, z * all + chunk0, first, last, address,
                        shared.row_bytes);
    // A pixel's channels lie in two lanes: the even one goes on with the first of their positions,
    // the odd one with the second. Pixel 0 of a position is the second of its input pair, pixel 1
    // the first of the next.
    const int half = lane & 1, pixel = lane >> 1 & 1;
    const Position mine = positions.at(tile * kPositions + half * 8 + lane / 4);
    const int unit = mine.strip * ROWS * shared.pairs + mine.pair + pixel;
    const uint32_t line = (z * c.images + mine.image) * 2 + 1 - pixel;
    const uint32_t to = (line * shared.units_padded + unit) * 4;
    const Pixel at{image0 + mine.image, row0 + mine.strip * ROWS, 2 * mine.pair + pixel};
    // Groups in turn, so that they need no more memory than one, and the sum's order stays.
#pragma unroll 1
    for (int turn = groups - 1; turn >= 0; --turn) {
      if (group == turn)
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          float both = (half ? logits[row][1] : logits[row][0]) +
                       shuffle_xor(half ? logits[row][0] : logits[row][1], 1);
          const uint32_t next = to + row * shared.pairs * 4;
          const Pixel there{at.image, at.y + row, at.x};
          if (!mine.valid || !is_inside(a.maps, there)) continue;
          if (turn < groups - 1) both += load_shared<float>(shared.logits + next);
          if (turn || rank.slices > 1) store_shared(shared.logits + next, both);
          else store_gate<T>(a, shared, rank, next, z, there, both);
        }
      if (turn) sync_threads();
    }
  }
}

// Where logits of slices are to be summed: the gates of all the block's pixels.
template <class T>
CASVIT_DEVICE void gates_of_slices(const SinglePassArguments& a, const SinglePassShared& shared,
                                   const Rank& rank, int image0, int row0) {
  const int images = a.cut.images, lane = thread_index() % 32, steps = shared.units_padded / 32;
  const Divisor by_pairs(shared.pairs), by_steps(steps);
#pragma unroll 1
  for (int task = thread_index() / 32; task < 4 * images * steps; task += kWarps) {
    const int line = by_steps.quotient(task), unit = by_steps.remainder(task, line) * 32 + lane;
    const int z = line >= 2 * images, row = by_pairs.quotient(unit);
    const Pixel at{image0 + line / 2 - z * images, row0 + row,
                   2 * by_pairs.remainder(unit, row) - 1 + line % 2};
    if (row >= shared.own_rows || !is_inside(a.maps, at)) continue;
    const uint32_t offset = (line * shared.units_padded + unit) * 4;
    float logit = 0.0f;
    for (int slice = 0; slice < rank.slices; ++slice)
      logit += load_cluster_shared<float>(rank.of(rank.band, slice), shared.logits + offset);
    store_gate<T>(a, shared, rank, offset, z, at, logit);
  }
}

// Sums of z s over the block's pixels: floats (2, images, channels of the cut).
template <class T>
CASVIT_DEVICE void sum_channels(const SinglePassArguments& a, const SinglePassShared& shared,
                                int image0, int chunks) {
  const Cut& c = a.cut;
  const int lane = thread_index() % 32, warp = thread_index() / 32, source = lane / 4 & 3;
  const uint32_t halves = source & 2 ? 0x7632u : 0x5410u;
  const int pairs_of_chunks = (chunks + 1) / 2;
  const Divisor by_pairs(pairs_of_chunks);
#pragma unroll 1
  for (int task = warp; task < 2 * c.images * pairs_of_chunks; task += kWarps) {
    const int line = by_pairs.quotient(task), chunk = by_pairs.remainder(task, line) * 2;
    const int z = line >= c.images, image = line - z * c.images;
    if (image0 + image >= a.maps.images) continue;
    const uint32_t from =
        shared.spatial + ((line * 2 + (source & 1)) * shared.units_padded + lane % 4 * 2) * 4;
    const uint32_t sums = shared.sums + ((line * c.chunks + chunk) * kChunk + lane * 2) * 4;
    sum_two_chunks<T>(
        c,
        shared_base() + z * shared.u + (image * shared.tile_rows + 1) * shared.row_bytes +
            chunk * kUnitBytes,
        shared.own_rows * shared.pairs, chunk + 1 < chunks,
        [&](int unit) {
          const uint2 words = load_shared<uint2>(from + unit * 4);
          return permute_bytes(words.x, words.y, halves);
        },
        [&](int which, float2 two) { store_shared(sums + which * kChunk * 4, two); });
  }
}

// The means of all channels, from the sums of all blocks; then the gates of the block's own.
template <class T>
CASVIT_DEVICE void gates_of_cluster(const SinglePassArguments& a, const SinglePassShared& shared,
                                    const Rank& rank, int image0, int chunk0, int chunks) {
  const Maps& m = a.maps;
  const Cut& c = a.cut;
  const int images = m.images - image0 < c.images ? m.images - image0 : c.images;
  const Divisor by_slice(c.chunks * kChunk);
  make_means<T>(
      m, c, shared.means, shared.mean_words, rank.band == 0 && rank.slice == 0 ? a.pooled : nullptr,
      image0, images, [&](int z, int image, int channel) {
        const int slice = by_slice.quotient(channel);
        const uint32_t from =
            shared.sums +
            ((z * c.images + image) * c.chunks * kChunk + by_slice.remainder(channel, slice)) * 4;
        float2 sum{0.0f, 0.0f};
        for (int band = 0; band < rank.bands; ++band) {
          const float2 two = load_cluster_shared<float2>(rank.of(band, slice), from);
          sum.x += two.x;
          sum.y += two.y;
        }
        return sum;
      });
  sync_threads();
  channel_gates<T>(m, c, a.packed, shared.means, shared.mean_words, shared.gates,
                   rank.band == 0 ? a.channel : nullptr, image0, images, chunk0, chunks);
}

// a in the place of q, by units. A thread keeps a chunk, whose channel gates it holds.
template <class T>
CASVIT_DEVICE void make_a_in_place(const SinglePassArguments& a, const SinglePassShared& shared,
                                   int image0, int chunks) {
  const Cut& c = a.cut;
  const Divisor by_chunks(chunks);
  const int step = by_chunks.quotient(kThreads), first = by_chunks.quotient(thread_index());
  const int chunk = by_chunks.remainder(thread_index(), first),
            units = shared.own_rows * shared.pairs;
  if (first >= step) return;
#pragma unroll 1
  for (int image = 0; image < c.images && image0 + image < a.maps.images; ++image) {
    const uint32_t gates = shared.gates + (image * c.chunks + chunk) * kUnitBytes;
    const float4 q = load_shared<float4>(gates);
    const float4 k = load_shared<float4>(gates + c.images * c.chunks * kUnitBytes);
    const float gq[4] = {q.x, q.y, q.z, q.w}, gk[4] = {k.x, k.y, k.z, k.w};
    uint32_t at = (image * shared.tile_rows + 1) * shared.row_bytes + first * pair_bytes(c) +
                  chunk * kUnitBytes;
    uint32_t from = shared.spatial + (image * 2 * shared.units_padded + first) * 4;
    const uint32_t second = shared.units_padded * 4, of_k = c.images * 2 * second;
    const auto spatial = [&](uint32_t offset) {
      const uint32_t word = load_shared<uint32_t>(from + offset);
      return low2<T>(word) + high2<T>(word);
    };
#pragma unroll 2
    for (int unit = first; unit < units; unit += step) {
      const uint4 qs = load_shared<uint4>(at), ks = load_shared<uint4>(shared.u + at);
      const uint2 left = gated<T>({qs.x, qs.y}, {ks.x, ks.y}, gq, gk, spatial(0), spatial(of_k));
      const uint2 right =
          gated<T>({qs.z, qs.w}, {ks.z, ks.w}, gq, gk, spatial(second), spatial(of_k + second));
      store_shared(at, uint4{left.x, left.y, right.x, right.y});
      at += step * pair_bytes(c);
      from += step * 4;
    }
  }
}

// Grid: (blocks of a cluster = bands x slices, image groups). ROWS: of a strip.
template <class T, int ROWS>
CASVIT_DEVICE void single_pass_block(const SinglePassArguments& a) {
  const Maps& m = a.maps;
  const Cut& c = a.cut;
  const SinglePassShared shared(m, c, ROWS);
  const PackedLayout layout(m.channels, m.padded);
  const int band = Divisor(shared.slices).quotient(block_x());
  const Rank rank{band, block_x() - band * shared.slices, c.bands, shared.slices};
  const int image0 = c.group() * c.images, row0 = band * shared.own_rows;
  const int chunk0 = rank.slice * c.chunks;
  const int chunks = m.chunks() - chunk0 < c.chunks ? m.chunks() - chunk0 : c.chunks;
  // Where a block has all rows, those above and below come as zeros with its own.
  const int border = rank.bands > 1 ? 0 : 1;
  const uint32_t first_row = (1 - border) * shared.row_bytes;
  const auto load = [&](int z, int x, uint32_t tile) {
    const Box box{image0, row0 - border, x, c.images, shared.own_rows + 2 * border, shared.pairs};
    load_tile<ROWS>(a.qkv + z * m.padded, m, c, box, chunk0, chunks, tile + first_row,
                    3 * m.padded);
  };

  load(0, -1, 0);
  load(1, -1, shared.u);
  copy_commit();
  fill_gaps(c, shared, chunks);
  copy_wait<0>();
  meet(rank);
  exchange_rows(shared, rank, 0);
  exchange_rows(shared, rank, shared.u);
  sync_threads();

  logits_of_slice<T, ROWS>(a, shared, rank, image0, row0, chunk0, chunks);
  if (rank.slices > 1) {
    cluster_sync();
    gates_of_slices<T>(a, shared, rank, image0, row0);
  }
  sync_threads();
  sum_channels<T>(a, shared, image0, chunks);
  meet(rank);
  gates_of_cluster<T>(a, shared, rank, image0, chunk0, chunks);
  sync_threads();
  make_a_in_place<T>(a, shared, image0, chunks);
  sync_threads();
  load(2, -2, shared.u);
  copy_commit();
  if (rank.bands > 1) cluster_sync();
  exchange_rows(shared, rank, 0);
  copy_wait<0>();
  sync_threads();

  const uint32_t own_u = shared.u + shared.row_bytes + pair_bytes(c);  // pixel 0 of its first row
  convolve<T, ROWS>(
      m, a.packed, layout.conv_taps, 0, layout.conv_bias, chunk0, chunks, c, 0, shared.tile_rows,
      shared.pairs, own_u, shared.tile_rows, c.pairs, shared.pairs,
      [&](const uint32_t (&first)[2], const bool (&valid)[2], int row, const float (&l)[4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t at = first[half] + row * shared.row_bytes;
          const uint32_t v = valid[half] ? load_shared<uint32_t>(at) : 0u;
          const uint32_t u = pack2<T>(l[2 * half] * low2<T>(v), l[2 * half + 1] * high2<T>(v));
          if (valid[half]) store_shared(at, u);
        }
      });
  if (rank.bands > 1) cluster_sync();
  else sync_threads();
  exchange_rows(shared, rank, shared.u);
  if (rank.bands > 1) sync_threads();

  convolve<T, ROWS>(
      m, a.packed, layout.conv_taps, 1, layout.conv_bias + m.chunks(), chunk0, chunks, c, shared.u,
      shared.tile_rows, shared.pairs, 0, shared.own_rows, (m.width + 2) / 2, shared.pairs,
      [&](const uint32_t (&first)[2], const bool (&valid)[2], int row, const float (&d)[4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (valid[half])
            store_shared(first[half] + row * shared.row_bytes,
                         pack2<T>(d[2 * half], d[2 * half + 1]));
      });
  sync_threads();
  store_tile<ROWS>(a.out, a.channels_last, m, c,
                   Box{image0, row0, -1, c.images, shared.own_rows, shared.pairs}, chunk0, chunks,
                   0);
  if (!rank.alone()) cluster_sync();  // nobody reads this block's memory any more
}

}  // namespace casvit::cuda
