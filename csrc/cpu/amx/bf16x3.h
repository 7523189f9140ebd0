// bf16x3: the qkv GEMM in split bf16 (bf16x3_pack.h). bf16 operands take one pass, float32 six,
// which still beats one pass of AVX-512 by far.
#pragma once

#include "cpu/amx/bf16x3_pack.h"

namespace casvit {
namespace CASVIT_ISA {

// The epilogue of two pixel tiles by two blocks: copies results to the planes while the next ones
// are multiplied, a few rows after every four tile products (64 cycles of the matrix unit). In one
// go before or after the products its time would come on top: the out-of-order window spans only a
// few tile products.
class CopyEpilogue {
 public:
  // Pixels [begin, end) of results [pixel tile][block][16 pixels][16]; add_up: to what is there.
  void start(const float* results, const PixelGroup<TILE>* pixel_groups, int begin, int end,
             float* plane, int64_t next_plane, int blocks, bool add_up) {
    results_ = results;
    pieces_ = pixel_groups;
    next_ = begin;
    end_ = end < begin ? begin : end;
    add_up_ = add_up;
    plane_ = plane;
    next_plane_ = next_plane;
    blocks_ = blocks;
  }
  // Spreads the rest over that many calls of step().
  void spread_over(int64_t steps) {
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
  const PixelGroup<TILE>* pieces_ = nullptr;
  float* plane_ = nullptr;
  int64_t next_plane_ = 0;
  int next_ = 0, end_ = 0, each_ = 0, blocks_ = 0;
  bool add_up_ = false;
};
// Up to 2 pixel tiles times 2 blocks: accumulators in tiles 0 to 3 (pixel tile * 2 + block), x in 4
// and 5, weights in 6 and 7. A tile can be reloaded only once the products that read it have
// started, so each pass orders its products by the tiles that the next pass reloads.
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
  inline __attribute__((always_inline)) void multiply_reload_x(const unsigned char* x) const {
    _tile_dpbf16ps(0, 4, 6);
    if (BLOCKS > 1) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(4, x, 64);
    if (PIXEL_TILES == 1) return;
    _tile_dpbf16ps(2, 5, 6);
    if (BLOCKS > 1) _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(5, x + x_next, 64);
  }
  inline __attribute__((always_inline)) void multiply_reload_w(const unsigned char* w) const {
    _tile_dpbf16ps(0, 4, 6);
    if (PIXEL_TILES > 1) _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(6, w, 64);
    if (BLOCKS == 1) return;
    _tile_dpbf16ps(1, 4, 7);
    if (PIXEL_TILES > 1) _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(7, w + w_next, 64);
  }
  inline __attribute__((always_inline)) void multiply_reload_both(const unsigned char* x,
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
  // Five of the six passes over a depth tile, of which the low part of x and the high part of the
  // weights are loaded. The sixth is multiply_reload_both, which loads the next depth tile. `step`
  // is called after each pass.
  template <class F>
  inline __attribute__((always_inline)) void first_five_passes(const unsigned char* x,
                                                               const unsigned char* w,
                                                               const F& step) const {
    multiply_reload_x(x + MIDDLE);
    step();
    multiply_reload_w(w + MIDDLE);
    step();
    multiply_reload_x(x + HIGH);
    step();
    multiply_reload_w(w + LOW);
    step();
    multiply_reload_w(w + HIGH);
    step();
  }
};

// The depth tiles of a slice, for one pair of pixel tiles and of blocks. bias: two tiles to start
// the accumulators (pixel tile * 2 + block) from, or null; to: where they go.
template <int PIXEL_TILES, int BLOCKS>
static void gemm_pair(const unsigned char* x, const unsigned char* w, int64_t w_next,
                      const Bf16Depth& depth, int64_t begin, const float* bias,
                      float* const (&to)[4], CopyEpilogue& copy) {
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
    copy.spread_over(length);
    o.load_x(x);
    o.load_w(w);
    for (int64_t t = 0; t < length; ++t) {
      x += t + 1 < length ? each : 0;  // the last load is not used
      w += t + 1 < length ? each : 0;
      o.multiply_reload_both(x, w);
      copy.step();
    }
  } else {
    copy.spread_over(6 * whole + (half ? 3 : 0));
    o.load_x(x + LOW);
    o.load_w(whole ? w + HIGH : w + TILE_BYTES);
    for (int64_t t = 0; t < whole; ++t) {
      o.first_five_passes(x, w, [&] { copy.step(); });
      const bool last = t + 1 == whole;
      x += last && !half ? 0 : each;
      w += last && !half ? 0 : each;
      o.multiply_reload_both(x + LOW, last && half ? w + TILE_BYTES : w);
      copy.step();
    }
    if (half) {
      o.multiply_reload_both(x + TILE_BYTES, w);
      copy.step();
      o.multiply_reload_x(x);
      copy.step();
      o.multiply_reload_x(x);
      copy.step();
    }
  }
  copy.finish();  // its source may be where these results go
  _tile_stored(0, to[0], 64);
  if (BLOCKS > 1) _tile_stored(1, to[1], 64);
  if (PIXEL_TILES > 1) _tile_stored(2, to[2], 64);
  if (PIXEL_TILES > 1 && BLOCKS > 1) _tile_stored(3, to[3], 64);
}

// The bias of one or two blocks as tiles of 16 equal rows; nullptr if it is zero.
static const float* broadcast_bias(const float* from, int blocks, float* to) {
  __mmask16 any = 0;
  for (int64_t b = 0; b < blocks; ++b)
    any |= _mm512_cmp_ps_mask(load(from + b * VL), zero(), _CMP_NEQ_UQ);
  if (!any) return nullptr;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < TILE; ++i) store(to + b * 256 + i * VL, load(from + b * VL));
  return to;
}

// The GEMM of one chunk of pixels.
class Bf16x3Gemm {
 public:
  static int64_t temp_bytes(const Bf16Depth& d, int64_t tiles) {
    return tiles * d.bytes() + 6 * TILE_BYTES;
  }
  // bias: of all blocks.
  Bf16x3Gemm(const Chunk& chunk, const Bf16Depth& depth, const float* bias, float* planes,
             void* temp)
      : chunk_(chunk), depth_(depth), bias_(bias), planes_(planes) {
    results_ = static_cast<float*>(temp);
    spread_ = results_ + 4 * 256;
    panels_ = reinterpret_cast<unsigned char*>(spread_ + 2 * 256);
    for (int64_t t = 0; t < chunk.tiles; ++t)
      pack_pixel_tile(chunk.x, chunk.g.C, chunk.pixel_groups[t], depth,
                      panels_ + t * depth.bytes());
  }
  // Blocks [begin, end). weights: those of block `begin`, then every `next` bytes.
  void multiply(const unsigned char* weights, int64_t next, int64_t begin, int64_t end) {
    weights_ = weights - begin * next;
    next_ = next;
    auto blocks_at = [&](int64_t block) { return block + 1 < end ? 2 : 1; };
    if (depth_.slice >= depth_.tiles) {  // all weights fit the L2 cache
      for (int64_t t = 0; t < chunk_.tiles; t += 2)
        for (int64_t block = begin; block < end; block += 2) pair(t, block, blocks_at(block), 0);
    } else {
      // K in slices: the weights of a slice stay in the L1 cache for all pixels.
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
    const PixelGroup<TILE>* pixel_groups = chunk_.pixel_groups + t;
    // Every slice accumulates from zero (the first from the bias) and is added to memory: in one
    // long chain the small partial products would be added to a large sum.
    const float* start = begin == 0 ? broadcast_bias(bias_ + block * VL, blocks, spread_) : nullptr;
    int first = 0, end = (pixel_tiles - 1) * TILE + pixel_groups[pixel_tiles - 1].count;
    float* to[4];
    for (int i = 0; i < 4; ++i) to[i] = results_ + i * 256;
    if (begin == 0) {
      for (int i = 0; i < pixel_tiles; ++i)
        for (int b = 0; b < blocks && is_contiguous(pixel_groups[i]); ++b)
          to[2 * i + b] = planes_ + (block + b) * plane + pixel_groups[i].to[0];
      if (is_contiguous(pixel_groups[pixel_tiles - 1])) end -= TILE;
      if (is_contiguous(pixel_groups[0])) first = TILE;
    }
    auto* f = pixel_tiles == 2 ? blocks == 2 ? gemm_pair<2, 2> : gemm_pair<2, 1>
              : blocks == 2    ? gemm_pair<1, 2>
                               : gemm_pair<1, 1>;
    f(panels_ + t * depth_.bytes(), weights_ + block * next_, next_, depth_, begin, start, to,
      copy_);
    copy_.start(results_, pixel_groups, first, end, planes_ + block * plane, plane, blocks,
                begin > 0);
  }
  // The 16 pixels are consecutive in the planes.
  static bool is_contiguous(const PixelGroup<TILE>& pixel_group) {
    return pixel_group.count == TILE &&
           pixel_group.to[TILE - 1] - pixel_group.to[0] == (TILE - 1) * VL;
  }
  // The weights of large C come from the L3 cache: prefetches a share of the next slice.
  void prefetch(int64_t block, int64_t begin, int64_t t) const {
    const int64_t bytes = depth_.parts * depth_.length(begin) * TILE_BYTES;
    const unsigned char* ahead = weights_ + block * next_ + begin * depth_.parts * TILE_BYTES;
    for (int64_t i = bytes * t / chunk_.tiles / 64; i < bytes * (t + 2) / chunk_.tiles / 64; ++i) {
      _mm_prefetch(ahead + i * 64, _MM_HINT_T1);
      _mm_prefetch(ahead + next_ + i * 64, _MM_HINT_T1);
    }
  }

  const Chunk& chunk_;
  const Bf16Depth& depth_;
  const float* bias_;
  float* planes_;
  unsigned char* panels_;
  float *results_, *spread_;  // 4 tiles; 2 tiles
  const unsigned char* weights_ = nullptr;
  int64_t next_ = 0;
  CopyEpilogue copy_;
};

}  // namespace CASVIT_ISA
}  // namespace casvit
