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
constexpr int PANEL = 2 * TILE;  // pixels of one panel

// Parts of the split: x = high + middle + low.
static int64_t parts_of(Product kind) { return kind == Product::F32 ? 3 : 1; }
static int64_t depth_tiles(int64_t C) { return (C + DEPTH - 1) / DEPTH; }

// Which part of x meets which part of the weights, ordered so that neighbours share an operand
// (it is still in the first-level cache) and the largest product comes last.
struct Pass {
  int x, w;
};
constexpr Pass PASSES_F32[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
constexpr Pass PASSES_BF16[] = {{0, 0}};

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

// Weights: [block][part][depth tile][16 channel pairs][16 outputs][2].
static int64_t product_weight_bytes(int64_t C, int64_t blocks, Product kind) {
  return 3 * blocks * parts_of(kind) * depth_tiles(C) * TILE_BYTES;
}

static void product_pack_weights(const float* matrix, int64_t C, int64_t blocks, Product kind,
                                 void* to) {
  const int64_t parts = parts_of(kind), deep = depth_tiles(C);
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t block = 0; block < 3 * blocks; ++block)
    for (int64_t d = 0; d < deep; ++d)
      for (int64_t c = 0; c < DEPTH; ++c) {
        alignas(64) float column[TILE];
        for (int64_t o = 0; o < TILE; ++o)
          column[o] = d * DEPTH + c < C ? matrix[(block * TILE + o) * C + d * DEPTH + c] : 0.0f;
        const Split s = split(load(column));
        for (int64_t part = 0; part < parts; ++part) {
          alignas(32) uint16_t bits[TILE];
          _mm256_store_si256(reinterpret_cast<__m256i*>(bits), s.part[part]);
          uint16_t* tile = out + ((block * parts + part) * deep + d) * (TILE_BYTES / 2);
          for (int64_t o = 0; o < TILE; ++o) tile[c / 2 * DEPTH + o * 2 + c % 2] = bits[o];
        }
      }
}

// Panels: [pixel tile][part][depth tile][16 pixels][32 channels].
static int64_t panel_bytes(int64_t C, Product kind) {
  return 2 * parts_of(kind) * depth_tiles(C) * TILE_BYTES;
}
static int64_t panels_per_chunk(int64_t C, Product kind) {
  int64_t n = (256 << 10) / panel_bytes(C, kind);
  return n < 7 ? 7 : n > 16 ? 16 : n;
}
static int64_t product_temp_bytes(int64_t C, Product kind, int64_t) {
  return panels_per_chunk(C, kind) * panel_bytes(C, kind) + 4 * TILE_BYTES;
}

// Stores 16 channels of 16 pixels; r[i] holds the channels of pixel i.
CASVIT_INLINE void store_split(const Vec (&r)[TILE], int64_t parts, int64_t deep, int64_t c,
                               unsigned char* tiles) {
  unsigned char* to = tiles + c / DEPTH * TILE_BYTES + c % DEPTH * 2;
  for (int i = 0; i < TILE; ++i) {
    const Split s = split(r[i]);
    for (int64_t part = 0; part < parts; ++part)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + part * deep * TILE_BYTES + i * 64),
                          s.part[part]);
  }
}

template <class T>
CASVIT_INLINE void pack_tile(const T* x, int64_t channel_stride, int64_t C,
                             const Piece<TILE>& piece, int64_t parts, unsigned char* tiles) {
  const int64_t deep = depth_tiles(C);
  for (int64_t c = 0; c < deep * DEPTH; c += TILE) {
    Vec r[TILE];
    if (c + TILE <= C && channel_stride == 1) {
      for (int i = 0; i < TILE; ++i) r[i] = load_as_float(x + piece.from[i] + c);
    } else if (piece.consecutive) {
      for (int i = 0; i < TILE; ++i)
        r[i] = c + i < C ? load_as_float(x + piece.from[0] + (c + i) * channel_stride) : zero();
      transpose(r);
    } else {
      for (int i = 0; i < TILE; ++i) {
        alignas(64) float channels[TILE];
        for (int j = 0; j < TILE; ++j)
          channels[j] = c + j < C ? widen_one(x + piece.from[i] + (c + j) * channel_stride) : 0.0f;
        r[i] = load(channels);
      }
    }
    store_split(r, parts, deep, c, tiles);
  }
}

static void pack_tile(const Input& x, int64_t C, const Piece<TILE>& piece, int64_t parts,
                      unsigned char* tiles) {
  switch (x.dtype) {
    case DType::F32:
      return pack_tile(static_cast<const float*>(x.data), x.channel_stride, C, piece, parts, tiles);
    case DType::BF16:
      return pack_tile(static_cast<const Bf16*>(x.data), x.channel_stride, C, piece, parts, tiles);
    case DType::F16:
      return pack_tile(static_cast<const F16*>(x.data), x.channel_stride, C, piece, parts, tiles);
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Up to 2 pixel tiles times 2 blocks: accumulators in tiles 0 to 3, x in 4 and 5, weights in 6, 7.
template <int PIXEL_TILES, int BLOCKS>
CASVIT_INLINE void multiply(const unsigned char* panel, const unsigned char* weights, int64_t parts,
                            int64_t deep, float* result) {
  const int64_t x_stride = parts * deep * TILE_BYTES, w_stride = x_stride;
  _tile_zero(0);
  if (BLOCKS > 1) _tile_zero(1);
  if (PIXEL_TILES > 1) _tile_zero(2);
  if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_zero(3);
  const Pass* passes = parts == 3 ? PASSES_F32 : PASSES_BF16;
  for (int64_t p = 0; p < (parts == 3 ? 6 : 1); ++p) {
    const unsigned char* x = panel + passes[p].x * deep * TILE_BYTES;
    const unsigned char* w = weights + passes[p].w * deep * TILE_BYTES;
    for (int64_t d = 0; d < deep; ++d, x += TILE_BYTES, w += TILE_BYTES) {
      _tile_loadd(4, x, 64);
      _tile_loadd(6, w, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (BLOCKS > 1) {
        _tile_loadd(7, w + w_stride, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (PIXEL_TILES > 1) {
        _tile_loadd(5, x + x_stride, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, result, 64);
  if (BLOCKS > 1) _tile_stored(1, result + 256, 64);
  if (PIXEL_TILES > 1) _tile_stored(2, result + 512, 64);
  if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_stored(3, result + 768, 64);
}

static void product(const PixelRun& run, const WeightsView& w, Product kind, int64_t block_begin,
                    int64_t block_end, float* planes, int64_t image_floats, void* temp) {
  const Geometry& g = *run.g;
  const int64_t parts = parts_of(kind), deep = depth_tiles(g.C);
  const int64_t tile_stride = parts * deep * TILE_BYTES;
  const int64_t chunk = panels_per_chunk(g.C, kind) * PANEL;
  float* result = static_cast<float*>(temp);
  unsigned char* panels = static_cast<unsigned char*>(temp) + 4 * TILE_BYTES;
  Piece<TILE> pieces[2 * 16];

  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t first = run.begin; first < run.end; first += chunk) {
    const int64_t end = first + chunk < run.end ? first + chunk : run.end;
    int64_t tiles = 0;
    for (int64_t p = first; p < end; p += TILE, ++tiles) {
      pieces[tiles].locate(run, p, image_floats);
      pack_tile(*run.x, g.C, pieces[tiles], parts, panels + tiles * tile_stride);
    }
    for (int64_t block = block_begin; block < block_end; block += 2) {
      const bool pair = block + 1 < block_end;
      const unsigned char* weights = w.product + block * tile_stride;
      for (int64_t t = 0; t < tiles; t += 2) {
        const bool two = t + 1 < tiles;
        const unsigned char* panel = panels + t * tile_stride;
        if (two && pair) multiply<2, 2>(panel, weights, parts, deep, result);
        else if (two) multiply<2, 1>(panel, weights, parts, deep, result);
        else if (pair) multiply<1, 2>(panel, weights, parts, deep, result);
        else multiply<1, 1>(panel, weights, parts, deep, result);
        for (int b = 0; b < (pair ? 2 : 1); ++b) {
          float* plane = planes + (block + b) * g.plane;
          const Vec bias = load(w.qkv_bias + (block + b) * VL);
          for (int i = 0; i < (two ? 2 : 1); ++i) {
            const Piece<TILE>& piece = pieces[t + i];
            const float* from = result + i * 512 + b * 256;
            for (int p = 0; p < piece.count; ++p)
              store(plane + piece.to[p], add(load(from + p * VL), bias));
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
