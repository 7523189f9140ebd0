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
constexpr int MOST_TILES = 32;  // pixel tiles packed at a time

// Which part of x (0 high, 1 middle, 2 low) meets which part of the weights, ordered so that
// neighbours share an operand (it is still in the first-level cache) and the largest comes last.
struct Pass {
  int x, w;
};
constexpr int PASSES = 6;
constexpr Pass PASS[PASSES] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};

// How a row of C channels, split into parts, is laid out along the depth of the tiles.
struct Depth {
  int64_t C16;      // C rounded up to whole vectors
  int64_t parts;    // 3 for float32, 1 for bf16
  bool unrolled;    // the six passes one behind the other, where that wastes less depth
  int64_t tiles;    // depth tiles of one pass
  int64_t stored;   // depth tiles kept in memory for a pixel (or output) tile
  int64_t bytes() const { return stored * TILE_BYTES; }
};
static Depth depth_of(int64_t C, Product kind) {
  Depth d{};
  d.C16 = (C + 15) / 16 * 16;
  d.parts = kind == Product::F32 ? 3 : 1;
  d.unrolled = d.parts == 3 && d.C16 % DEPTH != 0 && C <= 128;
  d.tiles = d.unrolled ? PASSES * d.C16 / DEPTH : (d.C16 + DEPTH - 1) / DEPTH;
  d.stored = d.unrolled ? d.tiles : d.parts * d.tiles;
  return d;
}

struct Split {
  __m256i part[3];
};
CASVIT_INLINE __m256i bits_of(__m256bh a) { return reinterpret_cast<__m256i>(a); }
CASVIT_INLINE Vec widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
CASVIT_INLINE Split split(Vec a) {
  Split s;
  s.part[0] = bits_of(_mm512_cvtneps_pbh(a));
  Vec rest = sub(a, widen(s.part[0]));
  s.part[1] = bits_of(_mm512_cvtneps_pbh(rest));
  rest = sub(rest, widen(s.part[1]));
  s.part[2] = bits_of(_mm512_cvtneps_pbh(rest));
  return s;
}

// Calls put(part, position) for every position along the depth that 16 channels from c on take.
template <bool X, class F>
CASVIT_INLINE void place(const Depth& d, int64_t c, const F& put) {
  if (d.unrolled) {
#pragma GCC unroll 6
    for (int pass = 0; pass < PASSES; ++pass)
      put(X ? PASS[pass].x : PASS[pass].w, pass * d.C16 + c);
  } else {
    for (int part = 0; part < static_cast<int>(d.parts); ++part)
      put(part, part * d.tiles * DEPTH + c);
  }
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
      place<false>(d, c / TILE * TILE, [&](int part, int64_t position) {
        alignas(32) uint16_t bits[TILE];
        _mm256_store_si256(reinterpret_cast<__m256i*>(bits), s.part[part]);
        position += c % TILE;
        uint16_t* tile = out + position / DEPTH * (TILE_BYTES / 2);
        for (int64_t o = 0; o < TILE; ++o)
          tile[position % DEPTH / 2 * DEPTH + o * 2 + position % 2] = bits[o];
      });
    }
  }
}

// Panels: [pixel tile][depth tile][16 pixels][32 channels].
static int64_t tiles_per_chunk(const Depth& d) {
  int64_t n = (192 << 10) / d.bytes() / 2 * 2;
  return n < 14 ? 14 : n > MOST_TILES ? MOST_TILES : n;
}
static int64_t product_temp_bytes(int64_t C, Product kind, int64_t) {
  const Depth d = depth_of(C, kind);
  return tiles_per_chunk(d) * d.bytes() + 6 * TILE_BYTES;
}

// Stores 16 channels (from c on) of 16 pixels; r[i] holds the channels of pixel i.
CASVIT_INLINE void store_split(const Vec (&r)[TILE], const Depth& d, int64_t c,
                               unsigned char* tiles) {
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i) {
    const Split s = split(r[i]);
    place<true>(d, c, [&](int part, int64_t position) __attribute__((always_inline)) {
      unsigned char* to =
          tiles + position / DEPTH * TILE_BYTES + position % DEPTH * 2 + i * 64;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), s.part[part]);
    });
  }
}

template <class T>
CASVIT_INLINE void pack_tile(const T* x, int64_t channel_stride, int64_t C,
                             const Piece<TILE>& piece, const Depth& d, unsigned char* tiles) {
  const int64_t padded = d.unrolled ? d.C16 : d.tiles * DEPTH;
  for (int64_t c = 0; c < padded; c += TILE) {
    Vec r[TILE];
    const bool whole = c + TILE <= C;
    if (whole && channel_stride == 1) {
      for (int i = 0; i < TILE; ++i) r[i] = load_as_float(x + piece.from[i] + c);
    } else if (whole && piece.consecutive) {
      const T* p = x + piece.from[0] + c * channel_stride;
      for (int i = 0; i < TILE; ++i) {
        r[i] = load_as_float(p + i * channel_stride);
        // Too many streams for the hardware prefetcher: one for each channel.
        _mm_prefetch(reinterpret_cast<const char*>(p + i * channel_stride + 4 * TILE), _MM_HINT_T0);
      }
      transpose(r);
    } else {
      for (int i = 0; i < TILE; ++i) {
        alignas(64) float channels[TILE];
        for (int j = 0; j < TILE; ++j)
          channels[j] = c + j < C ? widen_one(x + piece.from[i] + (c + j) * channel_stride) : 0.0f;
        r[i] = load(channels);
      }
    }
    store_split(r, d, c, tiles);
  }
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

// Up to 2 pixel tiles times 2 blocks: accumulators in tiles 0 to 3 (pixel tile * 2 + block), x in
// 4 and 5, weights in 6 and 7. Accumulators start from the bias, 16 equal rows for each block.
template <int PIXEL_TILES, int BLOCKS>
CASVIT_INLINE void multiply(const unsigned char* panel, const unsigned char* weights,
                            const Depth& depth, const float* bias, const Target (&target)[4]) {
  const int64_t next = depth.bytes();
  _tile_loadd(0, bias, 64);
  if (BLOCKS > 1) _tile_loadd(1, bias + 256, 64);
  if (PIXEL_TILES > 1) _tile_loadd(2, bias, 64);
  if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_loadd(3, bias + 256, 64);
  const bool one = depth.unrolled || depth.parts == 1;
  for (int pass = one ? PASSES - 1 : 0; pass < PASSES; ++pass) {
    const unsigned char* x = panel + PASS[pass].x * depth.tiles * TILE_BYTES;
    const unsigned char* w = weights + PASS[pass].w * depth.tiles * TILE_BYTES;
    for (int64_t t = 0; t < depth.tiles; ++t, x += TILE_BYTES, w += TILE_BYTES) {
      _tile_loadd(4, x, 64);
      _tile_loadd(6, w, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (BLOCKS > 1) {
        _tile_loadd(7, w + next, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (PIXEL_TILES > 1) {
        _tile_loadd(5, x + next, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, target[0].to, target[0].stride);
  if (BLOCKS > 1) _tile_stored(1, target[1].to, target[1].stride);
  if (PIXEL_TILES > 1) _tile_stored(2, target[2].to, target[2].stride);
  if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_stored(3, target[3].to, target[3].stride);
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
      pack_tile(*run.x, g.C, piece, depth, panels + tiles * depth.bytes());
    }
    for (int64_t block = block_begin; block < block_end; block += 2) {
      const int blocks = block + 1 < block_end ? 2 : 1;
      const unsigned char* weights = w.product + block * depth.bytes();
      for (int b = 0; b < blocks; ++b)
        for (int i = 0; i < TILE; ++i)
          store(bias + b * 256 + i * VL, load(w.qkv_bias + (block + b) * VL));
      for (int64_t t = 0; t < tiles; t += 2) {
        const int pixel_tiles = t + 1 < tiles ? 2 : 1;
        const unsigned char* panel = panels + t * depth.bytes();
        Target target[4];
        for (int i = 0; i < 4; ++i) target[i] = {result + i * 256, 64};
        for (int i = 0; i < pixel_tiles; ++i)
          if (in_row[t + i])
            for (int b = 0; b < blocks; ++b)
              target[2 * i + b].to = planes + (block + b) * g.plane + pieces[t + i].to[0];
        if (pixel_tiles == 2 && blocks == 2)
          multiply<2, 2>(panel, weights, depth, bias, target);
        else if (pixel_tiles == 2)
          multiply<2, 1>(panel, weights, depth, bias, target);
        else if (blocks == 2)
          multiply<1, 2>(panel, weights, depth, bias, target);
        else
          multiply<1, 1>(panel, weights, depth, bias, target);
        for (int i = 0; i < pixel_tiles; ++i) {
          const Piece<TILE>& piece = pieces[t + i];
          if (in_row[t + i]) continue;
          for (int b = 0; b < blocks; ++b) {
            float* plane = planes + (block + b) * g.plane;
            for (int p = 0; p < piece.count; ++p)
              store(plane + piece.to[p], load(result + (2 * i + b) * 256 + p * VL));
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
