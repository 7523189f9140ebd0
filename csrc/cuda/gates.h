// The spatial gates, and the sums that the channel gates take: z in {q, k}, all its channels in a
// block.
//
//   s = sigmoid(sum over channels of spatial_weight relu(depthwise of z, BatchNorm folded in))
//   pooled sum = sum over the block's pixels of z s
//
// Each tap is two words, rounded and what that left over: 2^-17 of it is lost in bfloat16, 2^-22 in
// float16, where PyTorch under autocast loses 2^-9 and 2^-11. A warp owns 16 positions and a share
// of the channels; its logits stay in registers over all chunks. The sums are a product of s with z
// on tensor cores; s counts twice, rounded and what is left over.
#pragma once

#include "pack.h"

namespace casvit::cuda {

struct GatesArguments {
  Maps maps;
  Cut cut;
  const uint16_t* qkv;
  const uint4* packed;
  float* spatial;  // (B, 2, H, W)
  float* sums;     // (bands x columns, 2, B, padded)
};

// What a block keeps in shared memory: z, then logits of each group of warps, then s as the mma
// takes it.
struct GatesShared {
  int units;         // of an image, without the rows above and below
  int units_padded;  // to whole steps of the sums
  int groups, pixels;
  uint32_t logits, gates, bytes;
  CASVIT_HOST_DEVICE GatesShared(const Cut& c, int rows) {
    units = c.strips * rows * (c.pairs + 1);
    units_padded = (units + 31) / 32 * 32;
    const int tiles = (c.images * c.strips * c.pairs + kPositions - 1) / kPositions;
    groups = kWarps / tiles;
    pixels = c.images * c.strips * rows * c.pairs * 2;
    logits = c.images * (c.strips * rows + 2) * (c.pairs + 1) * c.unit_stride * kUnitBytes;
    gates = logits + groups * pixels * 4;
    bytes = gates + c.images * 4 * units_padded * 2;
  }
};

// Adds chunks [first, last) of a gate to a warp's logits of one tile of positions; `index`: of the
// gate's chunk 0 among the packed ones. address: as `depthwise`, of chunk 0. logits[row][i]: of
// positions lane / 4 and lane / 4 + 8 the pixel (lane % 4) / 2, over two of each chunk's channels.
template <class T, int ROWS>
CASVIT_DEVICE void add_logits(float (&logits)[ROWS][2], const uint4* packed,
                              const PackedLayout& layout, int index, int first, int last,
                              uint32_t address, uint32_t row_bytes) {
  const int lane = thread_index() % 32;
#pragma unroll 1
  for (int chunk = first; chunk < last; ++chunk) {
    uint32_t taps[12];
    load_exact_taps(taps, packed, index + chunk, lane);
    const float4 of = load_constant(reinterpret_cast<const float4*>(packed) + layout.gate_rows +
                                    (index + chunk) * 2 + (lane & 1));
    const float bias[4] = {of.x, of.z, of.x, of.z};
    depthwise<T, ROWS, true>(
        address + chunk * kUnitBytes, row_bytes, taps, bias, [&](int row, const float (&d)[4]) {
          logits[row][0] = fused_multiply_add(relu(d[0]), of.y, logits[row][0]);
          logits[row][1] = fused_multiply_add(relu(d[2]), of.y, logits[row][1]);
          logits[row][0] = fused_multiply_add(relu(d[1]), of.w, logits[row][0]);
          logits[row][1] = fused_multiply_add(relu(d[3]), of.w, logits[row][1]);
        });
  }
}

// Sums of z s of two chunks over an image's units, by a warp on tensor cores. Rows of A are s of a
// pair's first and second pixels, and what rounding left over of these; its columns and B's rows
// are units; B's columns are two pixels x four channels. spatial(unit): this lane's word of A, of
// its units from `unit` on, zero behind the last. at(which chunk, channels 2 lane and the next) in
// lanes 0 and 1.
template <class T, class Spatial, class At>
CASVIT_DEVICE void sum_two_chunks(const Cut& c, uint32_t first_unit, int units, bool two,
                                  Spatial&& spatial, At&& at) {
  const int lane = thread_index() % 32;
  // Row of A, and pixel of the row and of the column.
  const bool counts = lane / 4 < 4 && (lane / 4 & 1) == (lane >> 1 & 1);
  const uint32_t last_unit = first_unit + (units - 1) * pair_bytes(c);
  const uint32_t next_chunk = two ? kUnitBytes : 0;
  uint32_t mine = first_unit + lane * pair_bytes(c);
  float d[2][4] = {};
#pragma unroll 2
  for (int unit = 0; unit < units; unit += 32) {
    uint32_t b[2][4];
    const uint32_t address = mine < last_unit ? mine : last_unit;  // behind it s is zero
    ldmatrix_x4_transposed(b[0], address);
    ldmatrix_x4_transposed(b[1], address + next_chunk);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t s[4] = {spatial(unit + step * 16), 0u, spatial(unit + step * 16 + 8), 0u};
      mma<T>(d[0], s, b[0] + 2 * step);
      mma<T>(d[1], s, b[1] + 2 * step);
    }
    mine += 32 * pair_bytes(c);
  }
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float first = counts ? d[which][0] : 0.0f, second = counts ? d[which][1] : 0.0f;
#pragma unroll
    for (int mask = 2; mask <= 8; mask *= 2) {
      first += shuffle_xor(first, mask);
      second += shuffle_xor(second, mask);
    }
    if (lane < 2 && (which == 0 || two)) at(which, float2{first, second});
  }
}

template <class T, int ROWS>
CASVIT_DEVICE void gates_block(const GatesArguments& a) {
  const Maps& m = a.maps;
  const Cut& c = a.cut;
  const GatesShared shared(c, ROWS);
  const PackedLayout layout(m.channels, m.padded);
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, z = block_z();
  const Divisor by_columns(c.columns);
  const int band = by_columns.quotient(block_x()), column = by_columns.remainder(block_x(), band);
  const int chunks = m.chunks(), rows = c.strips * ROWS;
  const Box box{c.group() * c.images, band * rows - 1, column * 2 * c.pairs - 1, c.images, rows + 2,
                c.pairs + 1};
  const uint32_t row_bytes = box.pairs * pair_bytes(c);

  load_tile<ROWS>(a.qkv + z * m.padded, m, c, box, 0, chunks, 0, 3 * m.padded);
  copy_commit();
  for (int i = thread; i < c.images * 4 * shared.units_padded / 2; i += kThreads)
    store_shared(shared.gates + i * 4, uint32_t{0});  // s of the halo

  const Positions positions(c.images, c.strips, c.pairs);
  const int tiles = positions.tiles();
  const Divisor by_tiles(tiles);
  const int group = by_tiles.quotient(warp), tile = by_tiles.remainder(warp, group);
  const Position p = positions.at(tile * kPositions + lane % 16);
  const uint32_t address = shared_base() + (p.image * box.rows + p.strip * ROWS) * row_bytes +
                           (p.pair + lane / 16) * pair_bytes(c);
  float logits[ROWS][2];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) logits[row][0] = logits[row][1] = 0.0f;
  copy_wait<0>();
  sync_threads();

  if (group < shared.groups) {
    const Divisor by_groups(shared.groups);
    add_logits<T, ROWS>(logits, a.packed, layout, z * chunks, by_groups.quotient(group * chunks),
                        by_groups.quotient((group + 1) * chunks), address, row_bytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Position mine = positions.at(tile * kPositions + half * 8 + lane / 4);
      const int first =
          ((mine.image * c.strips + mine.strip) * ROWS * c.pairs + mine.pair) * 2 + (lane >> 1 & 1);
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const float both = logits[row][half] + shuffle_xor(logits[row][half], 1);
        if (mine.valid && !(lane & 1))
          store_shared(shared.logits + (group * shared.pixels + first + row * c.pairs * 2) * 4,
                       both);
      }
    }
  }
  sync_threads();

  const int width = 2 * c.pairs, map = m.height * m.width;
  const Divisor by_width(width), by_rows(rows);
  float* spatial = a.spatial + (static_cast<int64_t>(box.image) * 2 + z) * map;
  for (int i = thread; i < shared.pixels; i += kThreads) {
    const int line = by_width.quotient(i), x = by_width.remainder(i, line);
    const int image = by_rows.quotient(line), row = by_rows.remainder(line, image);
    const int y = band * rows + row, global_x = column * width + x;
    if (y >= m.height || global_x >= m.width || box.image + image >= m.images) continue;
    float logit = load_shared<float>(shared.logits + i * 4);
#pragma unroll 1
    for (int other = 1; other < shared.groups; ++other)
      logit += load_shared<float>(shared.logits + (other * shared.pixels + i) * 4);
    const float s = sigmoid(logit);
    store_global(spatial + static_cast<int64_t>(image) * 2 * map + y * m.width + global_x, s);
    // Pixel x is half (x + 1) % 2 of the input pair (x + 1) / 2.
    const int unit = row * box.pairs + (x + 1) / 2, half = (x + 1) & 1;
    const uint32_t to = shared.gates + ((image * 4 + half) * shared.units_padded + unit) * 2;
    const uint32_t word = pack2<T>(s, 0.0f);
    store_shared(to, static_cast<uint16_t>(word));
    store_shared(to + 2 * shared.units_padded * 2,
                 static_cast<uint16_t>(pack2<T>(s - low2<T>(word), 0.0f)));
  }
  sync_threads();

  // An image at a time: a NaN of another one would not vanish times zero.
  const int pairs_of_chunks = (chunks + 1) / 2;
  const Divisor by_pairs(pairs_of_chunks);
#pragma unroll 1
  for (int task = warp; task < c.images * pairs_of_chunks; task += kWarps) {
    const int image = by_pairs.quotient(task), chunk = by_pairs.remainder(task, image) * 2;
    if (box.image + image >= m.images) continue;
    const uint32_t from =
        shared.gates + ((image * 4 + (lane / 4 & 3)) * shared.units_padded + lane % 4 * 2) * 2;
    float* sums =
        a.sums +
        (static_cast<int64_t>(block_x() * 2 + z) * m.images + box.image + image) * m.padded +
        chunk * kChunk + lane * 2;
    sum_two_chunks<T>(
        c, shared_base() + (image * box.rows + 1) * row_bytes + chunk * kUnitBytes, shared.units,
        chunk + 1 < chunks, [&](int unit) { return load_shared<uint32_t>(from + unit * 2); },
        [&](int which, float2 two) {
          store_global(reinterpret_cast<float2*>(sums + which * kChunk), two);
        });
  }
}

}  // namespace casvit::cuda
