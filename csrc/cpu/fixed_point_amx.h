// The float32 qkv product on the matrix unit in fixed point.
//
// The unit multiplies bytes into int32, twice as many at a time as bf16 numbers. Every pixel of x
// and every row of the weights is measured in units of its own, of which its largest value has
// FULL, and rounded to integers of 24 bits: three signed digits of base 256. Of the nine products
// of digits the six that reach float32 precision are summed, without any rounding, by order:
//   0: high high    1: high middle + middle high    2: high low + middle middle + low high
// Errors are like those of float32 sums as long as no value outshines the others of its pixel or
// row by far; else the unit is too coarse for these. Such rows are not packed in fixed point, and
// such pixels are refused: parts_amx.h takes them all.
#pragma once

#include "parts_amx.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int FIXED_DEPTH = 64;            // channels of one tile
constexpr float FULL = 127.0f * 65536.0f;  // so that no digit is above 127
constexpr float OUTSHINES = 16.0f;         // times the mean magnitude

// A depth tile is three tiles: the high, middle and low digits of 64 channels.
struct FixedDepth {
  int64_t tiles;
  int64_t slice;  // depth tiles worked on at a time: those of two pixel tiles fit the first-level
                  // cache
  explicit FixedDepth(int64_t C) : tiles((C + FIXED_DEPTH - 1) / FIXED_DEPTH) {
    const int64_t slices = (tiles + 3) / 4;
    slice = (tiles + slices - 1) / slices;
  }
  int64_t bytes() const { return 3 * tiles * TILE_BYTES; }
};

// The magnitudes in 16 pixels or rows, one for each lane.
struct Range {
  Vec top = zero(), sum = zero();
  inline __attribute__((always_inline)) void include(Vec a) {
    top = _mm512_max_ps(top, _mm512_abs_ps(a));
    sum = add(sum, _mm512_abs_ps(a));
  }
  bool fits(int64_t C) const {
    // Also keeps NaN out, which is in every sum, and infinity.
    const Vec most = min_keep_nan(splat(1e30f), mul(sum, splat(OUTSHINES / static_cast<float>(C))));
    const __mmask16 near = _mm512_cmp_ps_mask(top, most, _CMP_LE_OQ);
    const __mmask16 tiny = _mm512_cmp_ps_mask(top, splat(1e-25f), _CMP_LT_OQ);
    return (near & ~(tiny & _mm512_cmp_ps_mask(top, zero(), _CMP_NEQ_OQ))) == 0xffff;
  }
  // Units in one. Infinite where all is zero: the digits are then arbitrary, and the unit is zero.
  Vec scale() const { return div(splat(FULL), top); }
  static Vec unit(Vec scale) { return div(splat(1.0f), scale); }
};

// The digits of 64 numbers v[j][i], which are v[j] * scale rounded: a line for each place, with the
// digits of v[0][i], v[2][i], v[1][i], v[3][i] side by side. x and weights share this order.
struct Digits {
  __m512i high, middle, low;
};
CASVIT_INLINE Digits digits(const Vec (&v)[4], Vec scale) {
  __m512i n[4], lower[2], upper[2];
  // Adding half of 256 to a place carries what is too large for a signed digit to the next.
  for (int j = 0; j < 4; ++j)
    n[j] = _mm512_add_epi32(_mm512_cvtps_epi32(mul(v[j], scale)), _mm512_set1_epi32(0x8080));
  for (int j = 0; j < 2; ++j) {
    lower[j] = _mm512_mask_blend_epi16(0xaaaaaaaau, n[2 * j], _mm512_slli_epi32(n[2 * j + 1], 16));
    upper[j] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(n[2 * j], 16), n[2 * j + 1]);
  }
  constexpr uint64_t odd = 0xaaaaaaaaaaaaaaaau;
  const __m512i half = _mm512_set1_epi8(-128);
  Digits d;
  d.high = _mm512_mask_blend_epi8(odd, upper[0], _mm512_slli_epi16(upper[1], 8));
  d.middle = _mm512_mask_blend_epi8(odd, _mm512_srli_epi16(lower[0], 8), lower[1]);
  d.low = _mm512_mask_blend_epi8(odd, lower[0], _mm512_slli_epi16(lower[1], 8));
  d.middle = _mm512_xor_si512(d.middle, half);
  d.low = _mm512_xor_si512(d.low, half);
  return d;
}
CASVIT_INLINE void put_digits(const Digits& d, unsigned char* line) {
  _mm512_storeu_si512(line + HIGH, d.high);
  _mm512_storeu_si512(line + MIDDLE, d.middle);
  _mm512_storeu_si512(line + LOW, d.low);
}

// Weights of one block: the units of its 16 rows, then [depth tile][digit][16][16 outputs][4].
// A negative unit: the parts of parts_amx.h instead.
constexpr int64_t UNIT_BYTES = 64;
static const float* units(const unsigned char* block) {
  return reinterpret_cast<const float*>(block);
}
static bool in_fixed_point(const unsigned char* block) { return units(block)[0] >= 0.0f; }

static void pack_fixed_point(const float* matrix, int64_t C, unsigned char* block) {
  Range range;
  Vec column[4][TILE];
  for (int64_t c = 0; c < C; c += TILE) {
    columns(matrix + c, C, C - c, column[0]);
    for (int i = 0; i < TILE; ++i) range.include(column[0][i]);
  }
  if (!range.fits(C)) {
    store(reinterpret_cast<float*>(block), splat(-1.0f));
    return pack_parts(matrix, C, depth_of(C, Product::F32), block + UNIT_BYTES);
  }
  const Vec scale = range.scale();
  store(reinterpret_cast<float*>(block), Range::unit(scale));
  unsigned char* tile = block + UNIT_BYTES;
  for (int64_t c = 0; c < C; c += FIXED_DEPTH, tile += 3 * TILE_BYTES) {
    for (int64_t j = 0; j < 4; ++j) columns(matrix + c + j * TILE, C, C - c - j * TILE, column[j]);
    for (int i = 0; i < TILE; ++i)
      put_digits(digits({column[0][i], column[1][i], column[2][i], column[3][i]}, scale),
                 tile + i * 64);
  }
}
// The same block in parts.
static void rebuild_parts(const unsigned char* block, int64_t C, unsigned char* to) {
  const Depth depth = depth_of(C, Product::F32);
  const Vec unit = load(units(block));
  const unsigned char* tile = block + UNIT_BYTES;
  for (int64_t t = 0; t < depth.tiles; ++t) {
    const unsigned char* line = tile + t / 2 * 3 * TILE_BYTES;
    // Digits 0 and 2, or 1 and 3, of every four: see digits().
    auto weights = [&](int i, int digit) __attribute__((always_inline)) {
      const __m128i up = _mm_cvtsi32_si128(24 - 8 * digit), down = _mm_cvtsi32_si128(24);
      auto at = [&](int64_t place) __attribute__((always_inline)) {
        return _mm512_sra_epi32(_mm512_sll_epi32(_mm512_loadu_si512(line + place + i * 64), up),
                                down);
      };
      const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(at(HIGH), 8), at(MIDDLE));
      return mul(unit, _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), at(LOW))));
    };
    const int first = static_cast<int>(t % 2);
    Vec low[TILE], high[TILE];
    for (int i = 0; i < TILE; ++i) {
      low[i] = weights(i, first);
      high[i] = weights(i, first + 2);
    }
    put_weights(low, high, t, depth, to);
  }
}

// The sums of one block and up to two pixel tiles, on their way to the planes while the next ones
// are made, like Copy's.
struct Conversion {
  const int32_t* sums = nullptr;  // [order][pixel][16]
  const float* pixel_units = nullptr;
  const int64_t* to = nullptr;  // where the pixels lie in the plane
  float* plane = nullptr;
  Vec output_unit = zero(), bias = zero();
  int pixels = 0;

  // add_up: to what is there, instead of the bias.
  inline __attribute__((always_inline)) void convert(int pixel, bool add_up) const {
    const Vec sum =
        fma(fma(order(0, pixel), splat(256.0f), order(1, pixel)), splat(256.0f), order(2, pixel));
    const Vec unit = mul(splat(pixel_units[pixel]), output_unit);
    float* p = plane + to[pixel];
    store(p, fma(sum, unit, add_up ? load(p) : bias));
  }

 private:
  inline __attribute__((always_inline)) Vec order(int i, int pixel) const {
    return _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + i * 512 + pixel * VL));
  }
};

// What is multiplied at a time: pairs of pixel tiles or a single one, some depth tiles, blocks
// [begin, end).
struct Pass {
  int64_t pairs;
  int64_t pixels;          // of the last pair; all others have 32
  const unsigned char* x;  // of the first pixel tile
  int64_t x_next;          // from pixel tile to pixel tile
  const float* pixel_units;
  const int64_t* to;
  int64_t slice, tiles;  // depth tiles
  int64_t begin, end;
  const unsigned char* w;  // of block `begin`
  int64_t w_next;          // from block to block
  const float* bias;
  float* planes;
  int64_t plane;
  unsigned char* sums;  // two buffers
};
constexpr int64_t SUMS_BYTES = 6 * TILE_BYTES + 256;  // buffers are not a multiple of 4096 apart

// Accumulators (order * 2 + pixel tile) are tiles 0 to 5, x goes through 6 and weights through 7.
// While one block is multiplied the one before is converted, EACH pixels after any product. Its
// sums of order 2 are stored only then, when they are sure to be complete.
template <int EACH, bool ADD_UP>
static void multiply_digits(const Pass& given) {
  const Pass p = given;  // no store changes what it says
  Conversion before;
  int64_t buffer = 0, pair = 0, block = p.begin;
  while (pair < p.pairs) {
    const unsigned char* x = p.x + 2 * pair * p.x_next + p.slice * 3 * TILE_BYTES;
    const unsigned char* block_weights = p.w + (block - p.begin) * p.w_next;
    const unsigned char* w = block_weights + UNIT_BYTES + p.slice * 3 * TILE_BYTES;
    int32_t* to = reinterpret_cast<int32_t*>(p.sums + buffer);
    int pixel = 0;
    auto convert = [&]() __attribute__((always_inline)) {
      if (pixel + EACH > before.pixels) return;
#pragma GCC unroll 4
      for (int i = 0; i < EACH; ++i) before.convert(pixel + i, ADD_UP);
      pixel += EACH;
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < p.tiles; ++t, x += 3 * TILE_BYTES, w += 3 * TILE_BYTES) {
      const bool first = t == 0, last = t + 1 == p.tiles;
      const unsigned char* second = x + p.x_next;
      // Each product shares an operand with the one before, and its sums with none of the last
      // three, whose results are not there yet.
      _tile_loadd(7, w + HIGH, 64);
      _tile_loadd(6, x + HIGH, 64);
      _tile_dpbssd(0, 6, 7);
      if (!first) convert();
      _tile_loadd(7, w + MIDDLE, 64);
      _tile_dpbssd(2, 6, 7);
      if (first) {
        if (before.pixels) {
          int32_t* late = reinterpret_cast<int32_t*>(p.sums + (SUMS_BYTES - buffer));
          _tile_stored(4, late + 4 * 256, 64);
          _tile_stored(5, late + 5 * 256, 64);
        }
        _tile_zero(4);
        _tile_zero(5);
      } else {
        convert();
      }
      _tile_loadd(7, w + LOW, 64);
      _tile_dpbssd(4, 6, 7);
      convert();
      _tile_loadd(6, second + HIGH, 64);
      _tile_dpbssd(5, 6, 7);
      convert();
      _tile_loadd(7, w + MIDDLE, 64);
      _tile_dpbssd(3, 6, 7);
      convert();
      _tile_loadd(7, w + HIGH, 64);
      _tile_dpbssd(1, 6, 7);
      convert();
      if (last) _tile_stored(0, to, 64);
      _tile_loadd(6, x + LOW, 64);
      _tile_dpbssd(4, 6, 7);
      convert();
      _tile_loadd(6, second + LOW, 64);
      _tile_dpbssd(5, 6, 7);
      convert();
      _tile_loadd(6, second + MIDDLE, 64);
      _tile_dpbssd(3, 6, 7);
      convert();
      _tile_loadd(6, x + MIDDLE, 64);
      _tile_dpbssd(2, 6, 7);
      convert();
      if (last) _tile_stored(1, to + 256, 64);
      _tile_loadd(7, w + MIDDLE, 64);
      _tile_dpbssd(4, 6, 7);
      convert();
      _tile_loadd(6, second + MIDDLE, 64);
      _tile_dpbssd(5, 6, 7);
      convert();
    }
    _tile_stored(3, to + 3 * 256, 64);
    _tile_stored(2, to + 2 * 256, 64);
    for (; pixel < before.pixels; ++pixel) before.convert(pixel, ADD_UP);
    before.sums = to;
    before.pixel_units = p.pixel_units + pair * 2 * TILE;
    before.to = p.to + pair * 2 * TILE;
    before.plane = p.planes + block * p.plane;
    before.output_unit = load(units(block_weights));
    before.bias = load(p.bias + block * VL);
    before.pixels = static_cast<int>(pair + 1 < p.pairs ? 2 * TILE : p.pixels);
    buffer = SUMS_BYTES - buffer;
    if (++block == p.end) block = p.begin, ++pair;
  }
  int32_t* late = reinterpret_cast<int32_t*>(p.sums + (SUMS_BYTES - buffer));
  _tile_stored(4, late + 4 * 256, 64);
  _tile_stored(5, late + 5 * 256, 64);
  for (int pixel = 0; pixel < before.pixels; ++pixel) before.convert(pixel, ADD_UP);
}
static void multiply_digits(const Pass& p, bool add_up) {
  // EACH: such that all pixels are converted when the products are done.
  auto* f = p.tiles == 1   ? add_up ? multiply_digits<4, true> : multiply_digits<4, false>
            : p.tiles == 2 ? add_up ? multiply_digits<2, true> : multiply_digits<2, false>
            : add_up       ? multiply_digits<1, true>
                           : multiply_digits<1, false>;
  f(p);
}

// Channel c of the 16 pixels of a piece.
template <class T>
CASVIT_INLINE Vec pixels_of(const T* x, int64_t channel_stride, const Piece<TILE>& piece,
                            int64_t c) {
  const T* p = x + c * channel_stride;
  if (piece.consecutive) return load_as_float(p + piece.from[0]);
  if (piece.two_runs) {
    const __mmask16 all = first_lanes(piece.count), first = first_lanes(piece.run);
    return _mm512_or_ps(
        load_lanes_as_float(p + piece.from[0], first),
        load_lanes_as_float(p + piece.from[piece.count - 1] - (piece.count - 1), all & ~first));
  }
  alignas(64) float lanes[TILE];
  for (int i = 0; i < TILE; ++i) lanes[i] = widen_one(p + piece.from[i]);
  return load(lanes);
}
template <class T>
CASVIT_INLINE Range range_of(const T* x, int64_t channel_stride, int64_t C,
                             const Piece<TILE>& piece) {
  Range range;
  if (channel_stride != 1) {
    for (int64_t c = 0; c < C; ++c) {
      // Too many streams for the hardware prefetcher: one for each channel.
      if (piece.consecutive)
        _mm_prefetch(
            reinterpret_cast<const char*>(x + piece.from[0] + c * channel_stride + 4 * TILE),
            _MM_HINT_T0);
      range.include(pixels_of(x, channel_stride, piece, c));
    }
    return range;
  }
  Range own[TILE];
  for (int i = 0; i < TILE; ++i)
    for (int64_t c = 0; c < C; c += TILE)
      own[i].include(load_first_as_float(x + piece.from[i] + c,
                                         C - c < TILE ? static_cast<int>(C - c) : TILE));
  Vec top[TILE], sum[TILE];
  for (int i = 0; i < TILE; ++i) top[i] = own[i].top, sum[i] = own[i].sum;
  transpose(top);
  transpose(sum);
  for (int i = 0; i < TILE; ++i) {
    range.top = _mm512_max_ps(range.top, top[i]);
    range.sum = add(range.sum, sum[i]);
  }
  return range;
}

// The product of one chunk of pixels.
class FixedPointProduct {
 public:
  static int64_t temp_bytes(const FixedDepth& d, int64_t tiles) {
    return 2 * SUMS_BYTES + tiles * (TILE * 12 + d.bytes()) + d.bytes();
  }
  FixedPointProduct(const Chunk& chunk, const FixedDepth& depth, void* temp)
      : chunk_(chunk), depth_(depth) {
    sums_ = static_cast<unsigned char*>(temp);
    units_ = reinterpret_cast<float*>(sums_ + 2 * SUMS_BYTES);
    to_ = reinterpret_cast<int64_t*>(units_ + chunk.tiles * TILE);
    panels_ = reinterpret_cast<unsigned char*>(to_ + chunk.tiles * TILE);
  }
  // x to panels; false: it does not suit fixed point.
  bool pack() {
    const Input& x = chunk_.x;
    switch (x.dtype) {
      case DType::F32: return pack(static_cast<const float*>(x.data));
      case DType::BF16: return pack(static_cast<const Bf16*>(x.data));
      case DType::F16: return pack(static_cast<const F16*>(x.data));
    }
    return false;
  }
  // Blocks [begin, end). weights: those of block `begin`, then every `next` bytes.
  void multiply(const unsigned char* weights, int64_t next, const float* bias, int64_t begin,
                int64_t end, float* planes) {
    const int64_t group = 32;  // whose weights stay in the second-level cache for all pixels
    Pass p{};
    p.pairs = (chunk_.tiles + 1) / 2;
    p.pixels = (chunk_.tiles - 1) % 2 * TILE + chunk_.pieces[chunk_.tiles - 1].count;
    p.x = panels_;
    p.x_next = depth_.bytes();
    p.pixel_units = units_;
    p.to = to_;
    p.w_next = next;
    p.bias = bias;
    p.planes = planes;
    p.plane = chunk_.g.plane;
    p.sums = sums_;
    for (p.slice = 0; p.slice < depth_.tiles; p.slice += depth_.slice) {
      const int64_t rest = depth_.tiles - p.slice;
      p.tiles = rest < depth_.slice ? rest : depth_.slice;
      for (p.begin = begin; p.begin < end; p.begin += group) {
        p.end = p.begin + group < end ? p.begin + group : end;
        p.w = weights + (p.begin - begin) * next;
        multiply_digits(p, p.slice > 0);
      }
    }
  }

 private:
  template <class T>
  bool pack(const T* x) {
    const int64_t C = chunk_.g.C, stride = chunk_.x.channel_stride;
    unsigned char* tile = panels_;
    for (int64_t t = 0; t < chunk_.tiles; ++t) {
      const Piece<TILE>& piece = chunk_.pieces[t];
      const Range range = range_of(x, stride, C, piece);
      if (!range.fits(C)) return false;
      alignas(64) float scale[TILE], channels[TILE * FIXED_DEPTH];
      store(scale, range.scale());
      std::memcpy(to_ + t * TILE, piece.to, sizeof piece.to);
      store(units_ + t * TILE, mul(Range::unit(range.scale()), splat(65536.0f)));
      for (int64_t c = 0; c < C; c += FIXED_DEPTH, tile += 3 * TILE_BYTES) {
        for (int64_t j = 0; j < 4; ++j)
          gather(x, stride, C, piece, c + j * TILE, channels + j * TILE, FIXED_DEPTH);
        for (int i = 0; i < TILE; ++i) {
          const float* own = channels + i * FIXED_DEPTH;
          put_digits(
              digits({load(own), load(own + TILE), load(own + 2 * TILE), load(own + 3 * TILE)},
                     splat(scale[i])),
              tile + i * 64);
        }
      }
    }
    return true;
  }

  const Chunk& chunk_;
  const FixedDepth& depth_;
  unsigned char *sums_, *panels_;
  float* units_;  // of each pixel
  int64_t* to_;   // where it lies in a plane
};

}  // namespace CASVIT_ISA
}  // namespace casvit
