// The qkv product on the matrix unit in bf16 parts.
//
// The unit multiplies bf16 pairs into float32. A bf16 product (x in bf16) is one pass. A float32
// product is exact to float32 rounding all the same: each number is split into three bf16 parts
// (8 + 8 + 8 bits) and the six partial products that reach float32 precision are summed, the small
// ones first, in the same accumulators. Six passes here still beat one pass of AVX-512 by far.
#pragma once

#include "cpu/amx/tile.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr int DEPTH = 32;  // channels of one tile

// A depth tile keeps channels i and i + 16 side by side: pairs that need no shuffle to make. For
// float32 it is three tiles, the high, middle and low parts of 32 channels. Where only 16 channels
// are left, their parts pair up with one another instead, which halves the passes:
//   of x: [high high] [middle middle] [low high]; of the weights: [high middle] [high low].
struct Depth {
  int64_t parts;  // 3 for float32, 1 for bf16
  int64_t tiles;  // depth tiles
  bool half;      // the last has 16 channels
  int64_t slice;  // depth tiles worked on at a time: what fits the first-level cache
  Product kind() const { return parts == 3 ? Product::F32 : Product::BF16; }
  int64_t bytes() const { return parts * tiles * TILE_BYTES; }
  int64_t length(int64_t begin) const { return begin + slice < tiles ? slice : tiles - begin; }
};
static Depth depth_of(int64_t C, Product kind) {
  Depth d{};
  d.parts = kind == Product::F32 ? 3 : 1;
  d.tiles = (C + DEPTH - 1) / DEPTH;
  d.half = d.parts == 3 && (C + TILE - 1) / TILE % 2 == 1;
  d.slice = d.parts == 3 ? 4 : 8;
  return d;
}

CASVIT_INLINE Vec upper_half(Vec a) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), mask));
}
// The upper halves of two vectors as pairs: lane i of `low` below, lane i of `high` above.
CASVIT_INLINE __m512i pairs(Vec low, Vec high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                 _mm512_castps_si512(high));
}

// A number as a sum of three floats of 8 significant bits each, exactly: the upper halves are bf16.
struct Split {
  Vec part[3];
};
// Weights are rounded, so that what the passes leave out has no preferred sign.
CASVIT_INLINE Split split_rounded(Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);  // round half to even
  Split s;
  s.part[0] = upper_half(_mm512_castsi512_ps(_mm512_add_epi32(bits, even)));
  // Adding must not carry a NaN over into a number.
  const __m512i quiet =
      _mm512_or_si512(_mm512_castps_si512(upper_half(a)), _mm512_set1_epi32(0x400000));
  s.part[0] = _mm512_mask_mov_ps(s.part[0], _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                                 _mm512_castsi512_ps(quiet));
  const Vec rest = sub(a, s.part[0]);
  const __m512i half = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
  s.part[1] = upper_half(_mm512_castsi512_ps(half));
  s.part[2] = sub(rest, s.part[1]);
  return s;
}
// x is cut off instead, at half the price. The parts may have lower halves: pairs() drops them.
CASVIT_INLINE Split split_cut(Vec a) {
  Split s;
  s.part[0] = a;
  s.part[1] = sub(a, upper_half(a));
  s.part[2] = sub(s.part[1], upper_half(s.part[1]));
  return s;
}

CASVIT_INLINE void put_line(__m512i line, unsigned char* tile, int i) {
  _mm512_storeu_si512(tile + i * 64, line);
}
// One depth tile of 16 lines. Of the left operand line i is a row, first[i] and second[i] its
// channels (or pixels) 0 to 15 and 16 to 31; of the right one they are rows i and i + 16 of the
// depth. One operand of the two is cut, the other rounded: see split_rounded. bf16 is rounded.
template <class SplitBy>
CASVIT_INLINE void put_parts(const Vec (&first)[TILE], const Vec (&second)[TILE], Product kind,
                             const SplitBy& split, unsigned char* to) {
  if (kind == Product::BF16) {
    for (int i = 0; i < TILE; ++i)
      put_line(pairs(split_rounded(first[i]).part[0], split_rounded(second[i]).part[0]), to, i);
    return;
  }
  for (int i = 0; i < TILE; ++i) {
    const Split a = split(first[i]), b = split(second[i]);
    for (int part = 0; part < 3; ++part)
      put_line(pairs(a.part[part], b.part[part]), to + part * TILE_BYTES, i);
  }
}
CASVIT_INLINE void put_cut(const Vec (&first)[TILE], const Vec (&second)[TILE], Product kind,
                           unsigned char* to) {
  put_parts(first, second, kind, [](Vec a) { return split_cut(a); }, to);
}
CASVIT_INLINE void put_rounded(const Vec (&first)[TILE], const Vec (&second)[TILE], Product kind,
                               unsigned char* to) {
  put_parts(first, second, kind, [](Vec a) { return split_rounded(a); }, to);
}
// Weights of one block: [depth tile][16 channel pairs][16 outputs][2].
static void pack_parts(const float* matrix, int64_t C, const Depth& d, unsigned char* block) {
  for (int64_t t = 0; t < d.tiles; ++t, block += d.parts * TILE_BYTES) {
    const float* row = matrix + t * DEPTH;
    Vec low[TILE], high[TILE];
    columns(row, C, C - t * DEPTH, low);
    if (d.half && t == d.tiles - 1) {
      for (int i = 0; i < TILE; ++i) {
        const Split a = split_rounded(low[i]);
        put_line(pairs(a.part[0], a.part[1]), block, i);
        put_line(pairs(a.part[0], a.part[2]), block + TILE_BYTES, i);
        put_line(_mm512_setzero_si512(), block + 2 * TILE_BYTES, i);
      }
      return;
    }
    columns(row + TILE, C, C - t * DEPTH - TILE, high);
    put_rounded(low, high, d.kind(), block);
  }
}

// One pixel tile.
template <class T>
CASVIT_INLINE void pack_tile(const T* x, int64_t channel_stride, int64_t C,
                             const Piece<TILE>& piece, const Depth& d, unsigned char* to) {
  for (int64_t t = 0; t < d.tiles; ++t, to += d.parts * TILE_BYTES) {
    Vec first[TILE], second[TILE];
    gather(x, channel_stride, C, piece, t * DEPTH, first);
    if (d.half && t == d.tiles - 1) {
      for (int i = 0; i < TILE; ++i) {
        const Split a = split_cut(first[i]);
        put_line(pairs(a.part[0], a.part[0]), to, i);
        put_line(pairs(a.part[1], a.part[1]), to + TILE_BYTES, i);
        put_line(pairs(a.part[2], a.part[0]), to + 2 * TILE_BYTES, i);
      }
      return;
    }
    gather(x, channel_stride, C, piece, t * DEPTH + TILE, second);
    put_cut(first, second, d.kind(), to);
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

// The results of the last two pixel tiles by two blocks, on their way to the planes. They are
// copied while the next ones are multiplied, a few after any four products, which take the matrix
// unit 64 cycles. Before or behind them it would take its time once more: the core does not look
// ahead over more than a few products.
class Copy {
 public:
  // Pixels [begin, end) of results [pixel tile][block][16 pixels][16]; add_up: to what is there.
  void start(const float* results, const Piece<TILE>* pieces, int begin, int end, float* plane,
             int64_t next_plane, int blocks, bool add_up) {
    results_ = results;
    pieces_ = pieces;
    next_ = begin;
    end_ = end < begin ? begin : end;
    add_up_ = add_up;
    plane_ = plane;
    next_plane_ = next_plane;
    blocks_ = blocks;
  }
  // For that many steps.
  void share_out(int64_t steps) {
    const auto n = static_cast<uint32_t>(steps);
    each_ = static_cast<int>((static_cast<uint32_t>(end_ - next_) + n - 1) / n);
  }
  void step() { copy(next_ + each_ < end_ ? next_ + each_ : end_); }
  void finish() { copy(end_); }

 private:
  void copy(int end) {
    for (; next_ < end; ++next_) {
      const int tile = next_ / TILE, pixel = next_ % TILE;
      const float* from = results_ + tile * 512 + pixel * VL;
      float* to = plane_ + pieces_[tile].to[pixel];
      put(from, to);
      if (blocks_ > 1) put(from + 256, to + next_plane_);
    }
  }
  void put(const float* from, float* to) const {
    store(to, add_up_ ? add(load(to), load(from)) : load(from));
  }

  const float* results_ = nullptr;
  const Piece<TILE>* pieces_ = nullptr;
  float* plane_ = nullptr;
  int64_t next_plane_ = 0;
  int next_ = 0, end_ = 0, each_ = 0, blocks_ = 0;
  bool add_up_ = false;
};
// Where the parts lie in a depth tile.
constexpr int64_t HIGH = 0, MIDDLE = TILE_BYTES, LOW = 2 * TILE_BYTES;

// Up to 2 pixel tiles times 2 blocks: accumulators in tiles 0 to 3 (pixel tile * 2 + block), x in 4
// and 5, weights in 6 and 7. A tile can be loaded anew only when the products that read it have
// begun, so a step orders its products by what the next step replaces.
template <int PIXEL_TILES, int BLOCKS>
struct Operands {
  int64_t x_next, w_next;  // from the first pixel tile or block to the second, in bytes

  inline __attribute__((always_inline)) void load_x(const unsigned char* x) const {
    _tile_loadd(4, x, 64);
    if (PIXEL_TILES > 1) _tile_loadd(5, x + x_next, 64);
  }
  inline __attribute__((always_inline)) void load_w(const unsigned char* w) const {
    _tile_loadd(6, w, 64);
    if (BLOCKS > 1) _tile_loadd(7, w + w_next, 64);
  }
  inline __attribute__((always_inline)) void then_x(const unsigned char* x) const {
    _tile_dpbf16ps(0, 4, 6);
    if (BLOCKS > 1) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, x, 64);
    if (PIXEL_TILES == 1) return;
    _tile_dpbf16ps(2, 5, 6);
    if (BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(5, x + x_next, 64);
  }
  inline __attribute__((always_inline)) void then_w(const unsigned char* w) const {
    _tile_dpbf16ps(0, 4, 6);
    if (PIXEL_TILES > 1) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, w, 64);
    if (BLOCKS == 1) return;
    _tile_dpbf16ps(1, 4, 7);
    if (PIXEL_TILES > 1) _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(7, w + w_next, 64);
  }
  inline __attribute__((always_inline)) void then_both(const unsigned char* x,
                                                       const unsigned char* w) const {
    _tile_dpbf16ps(0, 4, 6);
    if (BLOCKS > 1) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, x, 64);
    if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
    if (BLOCKS > 1) _tile_loadd(7, w + w_next, 64);
    if (PIXEL_TILES > 1) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, w, 64);
    if (PIXEL_TILES > 1) _tile_loadd(5, x + x_next, 64);
  }
  // Five of the six passes over a depth tile whose low part of x and high part of the weights are
  // loaded; the last is then_both, which loads the next.
  // `step` is called after each pass.
  template <class F>
  inline __attribute__((always_inline)) void all_but_last(const unsigned char* x,
                                                          const unsigned char* w,
                                                          const F& step) const {
    then_x(x + MIDDLE);
    step();
    then_w(w + MIDDLE);
    step();
    then_x(x + HIGH);
    step();
    then_w(w + LOW);
    step();
    then_w(w + HIGH);
    step();
  }
};

// The depth tiles [begin, begin + length) of one pair of pixel tiles and blocks. bias: two tiles
// that accumulators (pixel tile * 2 + block) start from, or null; to: where these go.
template <int PIXEL_TILES, int BLOCKS>
static void multiply(const unsigned char* x, const unsigned char* w, int64_t w_next,
                     const Depth& depth, int64_t begin, const float* bias, float* const (&to)[4],
                     Copy& copy) {
  const Operands<PIXEL_TILES, BLOCKS> o{depth.bytes(), w_next};
  const int64_t each = depth.parts * TILE_BYTES, length = depth.length(begin);
  const bool half = depth.half && begin + length == depth.tiles;
  const int64_t whole = half ? length - 1 : length;
  x += begin * each;
  w += begin * each;
  if (bias) {
    _tile_loadd(0, bias, 64);
    if (BLOCKS > 1) _tile_loadd(1, bias + 256, 64);
    if (PIXEL_TILES > 1) _tile_loadd(2, bias, 64);
    if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_loadd(3, bias + 256, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  if (depth.parts == 1) {
    copy.share_out(length);
    o.load_x(x);
    o.load_w(w);
    for (int64_t t = 0; t < length; ++t) {
      x += t + 1 < length ? each : 0;  // the last load is idle
      w += t + 1 < length ? each : 0;
      o.then_both(x, w);
      copy.step();
    }
  } else {
    copy.share_out(6 * whole + (half ? 3 : 0));
    o.load_x(x + LOW);
    o.load_w(whole ? w + HIGH : w + TILE_BYTES);
    for (int64_t t = 0; t < whole; ++t) {
      o.all_but_last(x, w, [&] { copy.step(); });
      const bool last = t + 1 == whole;
      x += last && !half ? 0 : each;
      w += last && !half ? 0 : each;
      o.then_both(x + LOW, last && half ? w + TILE_BYTES : w);
      copy.step();
    }
    if (half) {
      o.then_both(x + TILE_BYTES, w);
      copy.step();
      o.then_x(x);
      copy.step();
      o.then_x(x);
      copy.step();
    }
  }
  copy.finish();  // it may come from where these results go
  _tile_stored(0, to[0], 64);
  if (BLOCKS > 1) _tile_stored(1, to[1], 64);
  if (PIXEL_TILES > 1) _tile_stored(2, to[2], 64);
  if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_stored(3, to[3], 64);
}

// What accumulators start from: the bias of one or two blocks, 16 equal rows for each; nullptr:
// zero.
static const float* spread_bias(const float* from, int blocks, float* to) {
  __mmask16 any = 0;
  for (int64_t b = 0; b < blocks; ++b)
    any |= _mm512_cmp_ps_mask(load(from + b * VL), zero(), _CMP_NEQ_UQ);
  if (!any) return nullptr;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < TILE; ++i) store(to + b * 256 + i * VL, load(from + b * VL));
  return to;
}

// The product of one chunk of pixels.
class PartsProduct {
 public:
  static int64_t temp_bytes(const Depth& d, int64_t tiles) {
    return tiles * d.bytes() + 6 * TILE_BYTES;
  }
  // bias: of all blocks.
  PartsProduct(const Chunk& chunk, const Depth& depth, const float* bias, float* planes, void* temp)
      : chunk_(chunk), depth_(depth), bias_(bias), planes_(planes) {
    results_ = static_cast<float*>(temp);
    spread_ = results_ + 4 * 256;
    panels_ = reinterpret_cast<unsigned char*>(spread_ + 2 * 256);
    for (int64_t t = 0; t < chunk.tiles; ++t)
      pack_tile(chunk.x, chunk.g.C, chunk.pieces[t], depth, panels_ + t * depth.bytes());
  }
  // Blocks [begin, end). weights: those of block `begin`, then every `next` bytes.
  void multiply(const unsigned char* weights, int64_t next, int64_t begin, int64_t end) {
    weights_ = weights - begin * next;
    next_ = next;
    auto blocks_at = [&](int64_t block) { return block + 1 < end ? 2 : 1; };
    if (depth_.slice >= depth_.tiles) {  // all weights fit the second-level cache
      for (int64_t t = 0; t < chunk_.tiles; t += 2)
        for (int64_t block = begin; block < end; block += 2) pair(t, block, blocks_at(block), 0);
    } else {
      // In slices of the depth, so that the weights of a slice stay in the first-level cache for
      // all pixels.
      for (int64_t block = begin; block < end; block += 2)
        for (int64_t slice = 0; slice < depth_.tiles; slice += depth_.slice) {
          const int64_t stop = slice + depth_.length(slice);
          const bool more = stop < depth_.tiles;
          for (int64_t t = 0; t < chunk_.tiles; t += 2) {
            if (more || block + 2 < end) prefetch(more ? block : block + 2, more ? stop : 0, t);
            pair(t, block, blocks_at(block), slice);
          }
        }
    }
    copy_.finish();
  }

 private:
  // Pixel tiles t and t + 1, blocks [block, block + blocks), a slice of the depth.
  void pair(int64_t t, int64_t block, int blocks, int64_t begin) {
    const int pixel_tiles = t + 1 < chunk_.tiles ? 2 : 1;
    const int64_t plane = chunk_.g.plane;
    const Piece<TILE>* pieces = chunk_.pieces + t;
    // Slices after the first start from zero, too, and are added up: in one long chain the small
    // parts would meet a large sum.
    const float* start = begin == 0 ? spread_bias(bias_ + block * VL, blocks, spread_) : nullptr;
    int first = 0, end = (pixel_tiles - 1) * TILE + pieces[pixel_tiles - 1].count;
    float* to[4];
    for (int i = 0; i < 4; ++i) to[i] = results_ + i * 256;
    if (begin == 0) {
      for (int i = 0; i < pixel_tiles; ++i)
        for (int b = 0; b < blocks && in_row(pieces[i]); ++b)
          to[2 * i + b] = planes_ + (block + b) * plane + pieces[i].to[0];
      if (in_row(pieces[pixel_tiles - 1])) end -= TILE;
      if (in_row(pieces[0])) first = TILE;
    }
    auto* f = pixel_tiles == 2 ? blocks == 2 ? amx::multiply<2, 2> : amx::multiply<2, 1>
              : blocks == 2    ? amx::multiply<1, 2>
                               : amx::multiply<1, 1>;
    f(panels_ + t * depth_.bytes(), weights_ + block * next_, next_, depth_, begin, start, to,
      copy_);
    copy_.start(results_, pieces, first, end, planes_ + block * plane, plane, blocks, begin > 0);
  }
  // The 16 pixels lie behind one another in the planes.
  static bool in_row(const Piece<TILE>& piece) {
    return piece.count == TILE && piece.to[TILE - 1] - piece.to[0] == (TILE - 1) * VL;
  }
  // The weights of large C come from the third-level cache: asks for a share of the next slice.
  void prefetch(int64_t block, int64_t begin, int64_t t) const {
    const int64_t bytes = depth_.parts * depth_.length(begin) * TILE_BYTES;
    const unsigned char* ahead = weights_ + block * next_ + begin * depth_.parts * TILE_BYTES;
    for (int64_t i = bytes * t / chunk_.tiles / 64; i < bytes * (t + 2) / chunk_.tiles / 64; ++i) {
      _mm_prefetch(ahead + i * 64, _MM_HINT_T1);
      _mm_prefetch(ahead + next_ + i * 64, _MM_HINT_T1);
    }
  }

  const Chunk& chunk_;
  const Depth& depth_;
  const float* bias_;
  float* planes_;
  unsigned char* panels_;
  float *results_, *spread_;  // 4 tiles; 2 tiles
  const unsigned char* weights_ = nullptr;
  int64_t next_ = 0;
  Copy copy_;
};

}  // namespace CASVIT_ISA
}  // namespace casvit
