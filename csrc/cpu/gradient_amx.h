// The gradients of the qkv product on the matrix unit, in float32 by the six passes of
// mixer_amx.cpp. G: [pixels][3C], the gradient at q, k and v; W: [3C][C].
//   of x: G W, one row for each pixel;   of the weights: G^T X, a sum over pixels.
#pragma once

namespace casvit {
namespace CASVIT_ISA {

constexpr int64_t PARTS_BYTES = 3 * TILE_BYTES;  // a depth tile: high, middle, low

// One depth tile of 16 lines. Of the left operand (split_cut) line i is a row, first[i] and
// second[i] its channels 0 to 15 and 16 to 31; of the right one (split_rounded) rows i and i + 16
// of the depth.
template <class SplitBy>
CASVIT_INLINE void put_parts(const Vec (&first)[TILE], const Vec (&second)[TILE],
                             const SplitBy& split, unsigned char* to) {
  for (int i = 0; i < TILE; ++i) {
    const Split a = split(first[i]), b = split(second[i]);
    for (int part = 0; part < 3; ++part)
      _mm512_store_si512(to + part * TILE_BYTES + i * 64, pairs(a.part[part], b.part[part]));
  }
}
CASVIT_INLINE void put_rows(const Vec (&first)[TILE], const Vec (&second)[TILE],
                            unsigned char* to) {
  put_parts(first, second, [](Vec a) { return split_cut(a); }, to);
}
CASVIT_INLINE void put_depth(const Vec (&first)[TILE], const Vec (&second)[TILE],
                             unsigned char* to) {
  put_parts(first, second, [](Vec a) { return split_rounded(a); }, to);
}
CASVIT_INLINE Vec load_some(const float* p, int64_t n) {
  return n >= TILE ? load(p) : n <= 0 ? zero() : load_first_as_float(p, static_cast<int>(n));
}

// sums [rows][row_floats] (+)= left right: `row_tiles` by `column_tiles` tiles, each with `depth`
// depth tiles one behind the other.
template <int ROWS, int COLUMNS>
static void multiply_add(const unsigned char* x, const unsigned char* w, int64_t depth, bool add_up,
                         float* sums, int64_t row_floats) {
  const Operands<ROWS, COLUMNS> o{depth * PARTS_BYTES, depth * PARTS_BYTES};
  const int64_t stride = row_floats * 4;
  float* below = sums + TILE * row_floats;
  if (add_up) {
    _tile_loadd(0, sums, stride);
    if (COLUMNS > 1) _tile_loadd(1, sums + TILE, stride);
    if (ROWS > 1) _tile_loadd(2, below, stride);
    if (ROWS > 1 && COLUMNS > 1) _tile_loadd(3, below + TILE, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  o.load_x(x + LOW);
  o.load_w(w + HIGH);
  for (int64_t t = 0; t < depth; ++t) {
    o.all_but_last(x, w);
    x += t + 1 < depth ? PARTS_BYTES : 0;  // the last load is idle
    w += t + 1 < depth ? PARTS_BYTES : 0;
    o.then_both(x + LOW, w);
  }
  _tile_stored(0, sums, stride);
  if (COLUMNS > 1) _tile_stored(1, sums + TILE, stride);
  if (ROWS > 1) _tile_stored(2, below, stride);
  if (ROWS > 1 && COLUMNS > 1) _tile_stored(3, below + TILE, stride);
}
static void multiply_add(const unsigned char* left, const unsigned char* right, int64_t row_tiles,
                         int64_t column_tiles, int64_t depth, bool add_up, float* sums) {
  const int64_t row_floats = column_tiles * TILE, each = depth * PARTS_BYTES;
  for (int64_t c = 0; c < column_tiles; c += 2)
    for (int64_t r = 0; r < row_tiles; r += 2) {
      const bool rows = r + 1 < row_tiles, columns = c + 1 < column_tiles;
      auto* f = rows      ? columns ? multiply_add<2, 2> : multiply_add<2, 1>
                : columns ? multiply_add<1, 2>
                          : multiply_add<1, 1>;
      f(left + r * each, right + c * each, depth, add_up, sums + r * TILE * row_floats + c * TILE,
        row_floats);
    }
}

// Tiles of pixels at a time: their left operand stays in the second-level cache.
static int64_t gradient_rows(int64_t depth) {
  const int64_t n = (256 << 10) / (depth * PARTS_BYTES) / 2 * 2;
  return n < 2 ? 2 : n > 16 ? 16 : n;
}
// Depth tiles of pixels at a time, for the gradient of the weights.
static int64_t gradient_depth(int64_t tiles) {
  const int64_t n = 256 / tiles;
  return n < 2 ? 2 : n > 16 ? 16 : n;
}

static int64_t input_gradient_temp_bytes(int64_t C) {
  const int64_t depth = (3 * C + DEPTH - 1) / DEPTH, columns = (C + TILE - 1) / TILE;
  const int64_t rows = gradient_rows(depth);
  return (columns + rows) * depth * PARTS_BYTES + (rows + 1) * columns * TILE_BYTES;
}

// Pixels [begin, end) of all images of the gradient at x.
static void input_gradient(const Geometry& g, const float* grad, const float* weight, int64_t begin,
                           int64_t end, const Output& out, void* temp) {
  const int64_t C = g.C, K = 3 * C, depth = (K + DEPTH - 1) / DEPTH;
  const int64_t columns = (C + TILE - 1) / TILE, most = gradient_rows(depth);
  unsigned char* right = static_cast<unsigned char*>(temp);
  unsigned char* left = right + columns * depth * PARTS_BYTES;
  float* sums = reinterpret_cast<float*>(left + most * depth * PARTS_BYTES);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t t = 0; t < depth; ++t) {
      Vec first[TILE], second[TILE];
      for (int i = 0; i < TILE; ++i) {
        const int64_t k = t * DEPTH + i, n = C - c * TILE;
        first[i] = load_some(weight + k * C + c * TILE, k < K ? n : 0);
        second[i] = load_some(weight + (k + TILE) * C + c * TILE, k + TILE < K ? n : 0);
      }
      put_depth(first, second, right + (c * depth + t) * PARTS_BYTES);
    }
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t pixel = begin; pixel < end; pixel += most * TILE) {
    const int64_t count = end - pixel < most * TILE ? end - pixel : most * TILE;
    const int64_t rows = (count + TILE - 1) / TILE;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < depth; ++t) {
        Vec first[TILE], second[TILE];
        for (int i = 0; i < TILE; ++i) {
          const int64_t p = r * TILE + i < count ? pixel + r * TILE + i : end - 1;
          first[i] = load_some(grad + p * K + t * DEPTH, K - t * DEPTH);
          second[i] = load_some(grad + p * K + t * DEPTH + TILE, K - t * DEPTH - TILE);
        }
        put_rows(first, second, left + (r * depth + t) * PARTS_BYTES);
      }
    multiply_add(left, right, rows, columns, depth, false, sums);
    // To memory: a piece of one image at a time.
    for (int64_t done = 0; done < count;) {
      const int64_t image = (pixel + done) / g.pixels(), at = (pixel + done) % g.pixels();
      const int64_t n = g.pixels() - at < count - done ? g.pixels() - at : count - done;
      for (int64_t c = 0; c < columns; ++c) {
        const float* from = sums + done * columns * TILE + c * TILE;
        switch (out.dtype) {
          case DType::F32: write_out<float>(g, out, image, c, at, n, from, columns * TILE); break;
          case DType::BF16: write_out<Bf16>(g, out, image, c, at, n, from, columns * TILE); break;
          case DType::F16: write_out<F16>(g, out, image, c, at, n, from, columns * TILE); break;
        }
      }
      done += n;
    }
  }
  _tile_release();
}

static int64_t weight_gradient_temp_bytes(int64_t C, int64_t row_tiles) {
  const int64_t columns = (C + TILE - 1) / TILE;
  return (row_tiles + columns) * gradient_depth(row_tiles + columns) * PARTS_BYTES +
         row_tiles * columns * TILE_BYTES;
}

// Rows [row_begin, row_end) of the gradient of the weights, summed over pixels [begin, end) of all
// images; to: [3C][C].
static void weight_gradient(const Geometry& g, const float* grad, const Input& x, int64_t begin,
                            int64_t end, int64_t row_begin, int64_t row_end, float* to,
                            void* temp) {
  const int64_t C = g.C, K = 3 * C, columns = (C + TILE - 1) / TILE;
  const int64_t rows = (row_end - row_begin + TILE - 1) / TILE;
  const int64_t depth = gradient_depth(rows + columns);
  unsigned char* left = static_cast<unsigned char*>(temp);
  unsigned char* right = left + rows * depth * PARTS_BYTES;
  float* sums = reinterpret_cast<float*>(right + columns * depth * PARTS_BYTES);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t pixel = begin; pixel < end; pixel += depth * DEPTH) {
    const int64_t count = end - pixel < depth * DEPTH ? end - pixel : depth * DEPTH;
    const int64_t tiles = (count + DEPTH - 1) / DEPTH;
    const PixelRun run{&x, &g, 0, pixel, end};
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t p = pixel + t * DEPTH, left_over = end - p;  // pixels from here on
      Piece<TILE> pieces[2];
      pieces[0].locate(run, p, 0);
      if (left_over > TILE) pieces[1].locate(run, p + TILE, 0);
      for (int64_t c = 0; c < columns; ++c) {
        Vec halves[2][TILE];
        for (int h = 0; h < 2; ++h) {
          alignas(64) float channels[TILE * TILE];
          if (left_over > h * TILE) gather_any(x, C, pieces[h], c * TILE, channels);
          for (int i = 0; i < TILE; ++i)
            halves[h][i] = h * TILE + i < left_over ? load(channels + i * TILE) : zero();
        }
        put_depth(halves[0], halves[1], right + (c * tiles + t) * PARTS_BYTES);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = row_begin + r * TILE, n = K - row;
        Vec halves[2][TILE];
        for (int h = 0; h < 2; ++h) {
          const float* from = grad + (p + h * TILE) * K + row;
          if (left_over >= (h + 1) * TILE && n >= TILE) {
            load_transposed(from, K, halves[h]);
          } else {
            for (int i = 0; i < TILE; ++i)
              halves[h][i] = h * TILE + i < left_over ? load_some(from + i * K, n) : zero();
            transpose(halves[h]);
          }
        }
        put_rows(halves[0], halves[1], left + (r * tiles + t) * PARTS_BYTES);
      }
    }
    multiply_add(left, right, rows, columns, tiles, pixel > begin, sums);
  }
  _tile_release();
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t c = 0; c < columns; ++c) {
      const Vec v = load(sums + (row - row_begin) * columns * TILE + c * TILE);
      store_first(to + row * C + c * TILE, v,
                  static_cast<int>(C - c * TILE < TILE ? C - c * TILE : TILE));
    }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
