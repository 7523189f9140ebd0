// The qkv product on the matrix unit (AMX) of recent Xeons; gates and combination are AVX-512's.
//
// The unit multiplies bf16 pairs into float32. A bf16 product (x in bf16) is one pass. A float32
// product is exact to float32 rounding all the same: each number is split into three bf16 parts
// (8 + 8 + 8 bits) and the six partial products that reach float32 precision are summed, the small
// ones first, in the same accumulators. Six passes here still beat one pass of AVX-512 by far.
#define CASVIT_ISA amx
#include "mixer.h"
#include "pixels.h"
#include "vec.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int TILE = 16;   // pixels or outputs of one tile
constexpr int DEPTH = 32;  // channels of one tile
constexpr int64_t TILE_BYTES = 1024;
constexpr int MOST_UNROLLED = 48;  // channels, see Depth::unrolled
constexpr int MOST_TILES = 32;     // pixel tiles packed at a time

// Which part of x (0 high, 1 middle, 2 low) meets which part of the weights, ordered so that
// neighbours share an operand (it is still in the first-level cache) and the largest comes last.
struct Pass {
  int x, w;
};
constexpr int PASSES = 6;
constexpr Pass PASS[PASSES] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};

// How a row of C channels, split into parts, is laid out along the depth of the tiles.
struct Depth {
  int64_t C16;    // C rounded up to whole vectors
  int64_t parts;  // 3 for float32, 1 for bf16
  bool unrolled;  // the six passes one behind the other, where that wastes less depth
  int64_t tiles;  // depth tiles of one pass
  int64_t slice;  // depth tiles worked on at a time: what fits the first-level cache
  // Unrolled rows of x hold every part once, [low, middle, high, first vector of high]: every pair
  // of neighbours in the sequence of passes lies somewhere in it, so no pass needs its own copy.
  int64_t x_row_bytes() const { return unrolled ? (3 * C16 / 16 + 1) * 32 : 64; }
  int64_t x_bytes() const { return unrolled ? TILE * x_row_bytes() : bytes(); }
  int64_t stored() const { return unrolled ? tiles : parts * tiles; }
  int64_t bytes() const { return stored() * TILE_BYTES; }
  int64_t length(int64_t begin) const { return begin + slice < tiles ? slice : tiles - begin; }
  // Depth tile t of a part: slice by slice, so that a slice is one stretch of memory and does not
  // crowd a few sets of the cache.
  int64_t at(int64_t part, int64_t t) const {
    const int64_t begin = t / slice * slice;
    return begin * stored() / tiles + part * length(begin) + t - begin;
  }
};
static Depth depth_of(int64_t C, Product kind) {
  Depth d{};
  d.C16 = (C + 15) / 16 * 16;
  d.parts = kind == Product::F32 ? 3 : 1;
  d.unrolled = d.parts == 3 && d.C16 % DEPTH != 0 && C <= MOST_UNROLLED;
  d.tiles = d.unrolled ? PASSES * d.C16 / DEPTH : (d.C16 + DEPTH - 1) / DEPTH;
  d.slice = d.unrolled ? d.tiles : d.parts == 3 ? 4 : 8;
  return d;
}

// x as a sum of three floats of 8 significant bits each, exactly: their upper halves are bf16.
struct Split {
  Vec part[3];
};
CASVIT_INLINE Split split(Vec a) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);  // round half to even
  Split s;
  s.part[0] = _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(bits, even), upper));
  // Adding must not carry a NaN over into a number.
  const __m512i quiet = _mm512_or_si512(_mm512_and_si512(bits, upper), _mm512_set1_epi32(0x400000));
  s.part[0] = _mm512_mask_mov_ps(s.part[0], _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                                 _mm512_castsi512_ps(quiet));
  const Vec rest = sub(a, s.part[0]);
  const __m512i half = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
  s.part[1] = _mm512_castsi512_ps(_mm512_and_si512(half, upper));
  s.part[2] = sub(rest, s.part[1]);
  return s;
}
// The bf16 halves of 32 channels.
CASVIT_INLINE __m512i upper_halves(Vec first, Vec second) {
  alignas(64) static constexpr uint16_t ODD[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                   23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                   45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(_mm512_castps_si512(first), _mm512_load_si512(ODD),
                                   _mm512_castps_si512(second));
}

// Weights: [block][depth tile][16 channel pairs][16 outputs][2].
static int64_t product_weight_bytes(int64_t C, int64_t blocks, Product kind) {
  return 3 * blocks * depth_of(C, kind).bytes();
}

static void product_pack_weights(const float* matrix, int64_t C, int64_t blocks, Product kind,
                                 void* to) {
  const Depth d = depth_of(C, kind);
  std::memset(to, 0, static_cast<size_t>(product_weight_bytes(C, blocks, kind)));
  for (int64_t block = 0; block < 3 * blocks; ++block) {
    uint16_t* out = static_cast<uint16_t*>(to) + block * d.bytes() / 2;
    for (int64_t c = 0; c < C; ++c) {
      alignas(64) float column[TILE];
      for (int64_t o = 0; o < TILE; ++o) column[o] = matrix[(block * TILE + o) * C + c];
      const Split s = split(load(column));
      auto put = [&](int part, int64_t position) {
        alignas(64) uint32_t bits[TILE];
        store(reinterpret_cast<float*>(bits), s.part[part]);
        uint16_t* tile = out + position / DEPTH * (TILE_BYTES / 2);
        for (int64_t o = 0; o < TILE; ++o)
          tile[position % DEPTH / 2 * DEPTH + o * 2 + position % 2] =
              static_cast<uint16_t>(bits[o] >> 16);
      };
      if (d.unrolled)
        for (int pass = 0; pass < PASSES; ++pass) put(PASS[pass].w, pass * d.C16 + c);
      else
        for (int part = 0; part < static_cast<int>(d.parts); ++part)
          put(part, d.at(part, c / DEPTH) * DEPTH + c % DEPTH);
    }
  }
}

// Panels: [pixel tile][depth tile][16 pixels][32 channels].
static int64_t tiles_per_chunk(const Depth& d) {
  int64_t n = (192 << 10) / d.x_bytes() / 2 * 2;
  return n < 14 ? 14 : n > MOST_TILES ? MOST_TILES : n;
}
static int64_t product_temp_bytes(int64_t C, Product kind, int64_t) {
  const Depth d = depth_of(C, kind);
  return tiles_per_chunk(d) * d.x_bytes() + 6 * TILE_BYTES;
}

// 16 channels from c on of 16 pixels, as floats: to[i * stride] are those of pixel i.
template <class T>
CASVIT_INLINE void gather(const T* x, int64_t channel_stride, int64_t C, const Piece<TILE>& piece,
                          int64_t c, float* to, int64_t stride) {
  if (c + TILE <= C && channel_stride == 1) {
    for (int i = 0; i < TILE; ++i) store(to + i * stride, load_as_float(x + piece.from[i] + c));
  } else if (c + TILE <= C && piece.consecutive) {
    const T* p = x + piece.from[0] + c * channel_stride;
    Vec r[TILE];
    for (int i = 0; i < TILE; ++i) {
      r[i] = load_as_float(p + i * channel_stride);
      // Too many streams for the hardware prefetcher: one for each channel.
      _mm_prefetch(reinterpret_cast<const char*>(p + i * channel_stride + 4 * TILE), _MM_HINT_T0);
    }
    transpose(r);
    for (int i = 0; i < TILE; ++i) store(to + i * stride, r[i]);
  } else {
    for (int i = 0; i < TILE; ++i)
      for (int j = 0; j < TILE; ++j)
        to[i * stride + j] =
            c + j < C ? widen_one(x + piece.from[i] + (c + j) * channel_stride) : 0.0f;
  }
}

// Where depth tile t of the unrolled passes begins in a row of x, in vectors.
template <int BLOCKS>
constexpr int unrolled_at(int t) {
  const int pass = 2 * t / BLOCKS, block = 2 * t % BLOCKS;
  return (2 - PASS[pass].x) * BLOCKS + block;
}

// 16 pixels of BLOCKS (odd) vectors as unrolled rows.
template <int BLOCKS>
CASVIT_INLINE void pack_unrolled(const float* channels, unsigned char* tiles) {
  constexpr int LINES = (3 * BLOCKS + 1) / 2;
  for (int i = 0; i < TILE; ++i) {
    Split s[BLOCKS];
#pragma GCC unroll 3
    for (int b = 0; b < BLOCKS; ++b) s[b] = split(load(channels + (i * BLOCKS + b) * TILE));
    auto vector = [&](int v) __attribute__((always_inline)) {
      return v < 3 * BLOCKS ? s[v % BLOCKS].part[2 - v / BLOCKS] : s[0].part[0];
    };
#pragma GCC unroll 5
    for (int line = 0; line < LINES; ++line)
      _mm512_storeu_si512(tiles + (i * LINES + line) * 64,
                          upper_halves(vector(2 * line), vector(2 * line + 1)));
  }
}

// One pixel tile: every row of a depth tile is written as one line of 32 channels.
template <class T>
CASVIT_INLINE void pack_tile(const T* x, int64_t channel_stride, int64_t C,
                             const Piece<TILE>& piece, const Depth& d, unsigned char* tiles) {
  alignas(64) float channels[TILE * (MOST_UNROLLED > DEPTH ? MOST_UNROLLED : DEPTH)];
  if (!d.unrolled) {
    for (int64_t t = 0; t < d.tiles; ++t) {
      for (int64_t half = 0; half < DEPTH; half += TILE)
        gather(x, channel_stride, C, piece, t * DEPTH + half, channels + half, DEPTH);
      for (int i = 0; i < TILE; ++i) {
        const Split first = split(load(channels + i * DEPTH));
        const Split second = split(load(channels + i * DEPTH + TILE));
        for (int64_t part = 0; part < d.parts; ++part)
          _mm512_storeu_si512(tiles + d.at(part, t) * TILE_BYTES + i * 64,
                              upper_halves(first.part[part], second.part[part]));
      }
    }
    return;
  }
  for (int64_t b = 0; b < d.C16 / TILE; ++b)
    gather(x, channel_stride, C, piece, b * TILE, channels + b * TILE, d.C16);
  if (d.C16 == TILE) pack_unrolled<1>(channels, tiles);
  else pack_unrolled<3>(channels, tiles);
}

static void pack_tile(const Input& x, int64_t C, const Piece<TILE>& piece, const Depth& d,
                      unsigned char* tiles) {
  switch (x.dtype) {
    case DType::F32:
      return pack_tile(static_cast<const float*>(x.data), x.channel_stride, C, piece, d, tiles);
    case DType::BF16:
      return pack_tile(static_cast<const Bf16*>(x.data), x.channel_stride, C, piece, d, tiles);
    case DType::F16:
      return pack_tile(static_cast<const F16*>(x.data), x.channel_stride, C, piece, d, tiles);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Where the 16 pixels by 16 outputs of an accumulator go: rows `stride` bytes apart.
struct Target {
  float* to;
  int64_t stride;
};

// One step: x is where this depth tile of the first pixel tile lies, w that of the first block.
template <int PIXEL_TILES, int BLOCKS>
CASVIT_INLINE void step(const unsigned char* x, int64_t x_row, int64_t x_next,
                        const unsigned char* w, int64_t w_next) {
  _tile_loadd(4, x, x_row);
  _tile_loadd(6, w, 64);
  _tile_dpbf16ps(0, 4, 6);
  if (BLOCKS > 1) {
    _tile_loadd(7, w + w_next, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if (PIXEL_TILES > 1) {
    _tile_loadd(5, x + x_next, x_row);
    _tile_dpbf16ps(2, 5, 6);
    if (BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

// Up to 2 pixel tiles times 2 blocks over the slice of the depth that starts at `begin`:
// accumulators in tiles 0 to 3 (pixel tile * 2 + block), x in 4 and 5, weights in 6 and 7.
// Accumulators start from the bias, 16 equal rows for each block. UNROLLED: vectors of C, or 0.
template <int UNROLLED, int PIXEL_TILES, int BLOCKS>
CASVIT_INLINE void multiply(const unsigned char* panel, const unsigned char* weights,
                            const Depth& depth, int64_t begin, const float* bias,
                            const Target (&target)[4]) {
  const int64_t x_next = depth.x_bytes(), w_next = depth.bytes();
  _tile_loadd(0, bias, 64);
  if (BLOCKS > 1) _tile_loadd(1, bias + 256, 64);
  if (PIXEL_TILES > 1) _tile_loadd(2, bias, 64);
  if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_loadd(3, bias + 256, 64);
  if constexpr (UNROLLED > 0) {
#pragma GCC unroll 9
    for (int t = 0; t < PASSES * UNROLLED / 2; ++t)
      step<PIXEL_TILES, BLOCKS>(panel + unrolled_at<UNROLLED>(t) * 32, (3 * UNROLLED + 1) * 32,
                                x_next, weights + t * TILE_BYTES, w_next);
  } else {
    const int64_t length = depth.length(begin);
    for (int pass = depth.parts == 1 ? PASSES - 1 : 0; pass < PASSES; ++pass) {
      const unsigned char* x = panel + depth.at(PASS[pass].x, begin) * TILE_BYTES;
      const unsigned char* w = weights + depth.at(PASS[pass].w, begin) * TILE_BYTES;
      for (int64_t t = 0; t < length; ++t)
        step<PIXEL_TILES, BLOCKS>(x + t * TILE_BYTES, 64, x_next, w + t * TILE_BYTES, w_next);
    }
  }
  _tile_stored(0, target[0].to, target[0].stride);
  if (BLOCKS > 1) _tile_stored(1, target[1].to, target[1].stride);
  if (PIXEL_TILES > 1) _tile_stored(2, target[2].to, target[2].stride);
  if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_stored(3, target[3].to, target[3].stride);
}

template <int UNROLLED>
CASVIT_INLINE void multiply(int pixel_tiles, int blocks, const unsigned char* panel,
                            const unsigned char* weights, const Depth& depth, int64_t begin,
                            const float* bias, const Target (&target)[4]) {
  if (pixel_tiles == 2 && blocks == 2)
    multiply<UNROLLED, 2, 2>(panel, weights, depth, begin, bias, target);
  else if (pixel_tiles == 2) multiply<UNROLLED, 2, 1>(panel, weights, depth, begin, bias, target);
  else if (blocks == 2) multiply<UNROLLED, 1, 2>(panel, weights, depth, begin, bias, target);
  else multiply<UNROLLED, 1, 1>(panel, weights, depth, begin, bias, target);
}

static void product(const PixelRun& run, const WeightsView& w, Product kind, int64_t block_begin,
                    int64_t block_end, float* planes, int64_t image_floats, void* temp) {
  const Geometry& g = *run.g;
  const Depth depth = depth_of(g.C, kind);
  const int64_t chunk = tiles_per_chunk(depth) * TILE;
  float* result = static_cast<float*>(temp);  // 4 tiles, for pixels that do not lie in one row
  float* bias = result + 4 * 256;             // 2 tiles
  unsigned char* panels = static_cast<unsigned char*>(temp) + 6 * TILE_BYTES;
  Piece<TILE> pieces[MOST_TILES];
  bool in_row[MOST_TILES];

  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t first = run.begin; first < run.end; first += chunk) {
    const int64_t end = first + chunk < run.end ? first + chunk : run.end;
    int64_t tiles = 0;
    for (int64_t p = first; p < end; p += TILE, ++tiles) {
      Piece<TILE>& piece = pieces[tiles];
      piece.locate(run, p, image_floats);
      in_row[tiles] = piece.count == TILE && piece.to[TILE - 1] - piece.to[0] == (TILE - 1) * VL;
      pack_tile(*run.x, g.C, piece, depth, panels + tiles * depth.x_bytes());
    }
    for (int64_t block = block_begin; block < block_end; block += 2) {
      const int blocks = block + 1 < block_end ? 2 : 1;
      const unsigned char* weights = w.product + block * depth.bytes();
      // In slices of the depth, so that the weights of a slice stay in the first-level cache for
      // all pixels; slices after the first are added to what is there.
      for (int64_t begin = 0; begin < depth.tiles; begin += depth.slice) {
        const int64_t stop = begin + depth.length(begin);
        const bool add_up = begin > 0;
        for (int b = 0; b < blocks; ++b)
          for (int i = 0; i < TILE; ++i)
            store(bias + b * 256 + i * VL, add_up ? zero() : load(w.qkv_bias + (block + b) * VL));
        const int64_t next_begin = stop < depth.tiles ? stop : 0;
        const int64_t next_block = stop < depth.tiles ? block : block + 2;
        for (int64_t t = 0; t < tiles; t += 2) {
          if (next_block < block_end) {
            // The weights of large C come from the third-level cache: ask for the next slice now.
            const int64_t bytes =
                (depth.unrolled ? 1 : depth.parts) * depth.length(next_begin) * TILE_BYTES;
            const unsigned char* ahead =
                w.product + next_block * depth.bytes() + depth.at(0, next_begin) * TILE_BYTES;
            for (int64_t i = bytes * t / tiles / 64; i < bytes * (t + 2) / tiles / 64; ++i) {
              _mm_prefetch(ahead + i * 64, _MM_HINT_T1);
              _mm_prefetch(ahead + depth.bytes() + i * 64, _MM_HINT_T1);
            }
          }
          const int pixel_tiles = t + 1 < tiles ? 2 : 1;
          const unsigned char* panel = panels + t * depth.x_bytes();
          Target target[4];
          for (int i = 0; i < 4; ++i) target[i] = {result + i * 256, 64};
          for (int i = 0; i < pixel_tiles; ++i)
            if (in_row[t + i] && !add_up)
              for (int b = 0; b < blocks; ++b)
                target[2 * i + b].to = planes + (block + b) * g.plane + pieces[t + i].to[0];
          if (!depth.unrolled)
            multiply<0>(pixel_tiles, blocks, panel, weights, depth, begin, bias, target);
          else if (depth.C16 == TILE)
            multiply<1>(pixel_tiles, blocks, panel, weights, depth, begin, bias, target);
          else multiply<3>(pixel_tiles, blocks, panel, weights, depth, begin, bias, target);
          for (int i = 0; i < pixel_tiles; ++i) {
            const Piece<TILE>& piece = pieces[t + i];
            if (in_row[t + i] && !add_up) continue;
            for (int b = 0; b < blocks; ++b) {
              float* plane = planes + (block + b) * g.plane;
              const float* from = result + (2 * i + b) * 256;
              for (int p = 0; p < piece.count; ++p) {
                float* to = plane + piece.to[p];
                const Vec v = load(from + p * VL);
                store(to, add_up ? add(load(to), v) : v);
              }
            }
          }
        }
      }
    }
  }
  _tile_release();
}

}  // namespace CASVIT_ISA

const Kernels& amx_kernels() {
  using namespace amx;
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "amx";
    k.product_weight_bytes = product_weight_bytes;
    k.product_pack_weights = product_pack_weights;
    k.product_temp_bytes = product_temp_bytes;
    k.product = product;
    return k;
  }();
  return kernels;
}

}  // namespace casvit
