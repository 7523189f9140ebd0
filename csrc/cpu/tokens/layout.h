// Token clustering and reconstruction: which tokens belong to which cell, and how rows of tokens
// and centres lie in scratch memory. As casvit_kernels/ops/tokens/cells.py.
#pragma once

#include "cpu/layout.h"

namespace casvit {

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A map of H x W tokens on a grid of h x w cells. Axis 0 goes down, 1 across.
struct TokenMap {
  int64_t channels;
  int64_t row;  // floats of a token or a centre: channels, then zeros
  int64_t size[2], grid[2];
  int64_t reach;  // cells of a window on each side of its middle

  int64_t tokens() const { return size[0] * size[1]; }
  int64_t cells() const { return grid[0] * grid[1]; }
  int64_t window() const { return 2 * reach + 1; }
  int64_t slots() const { return window() * window(); }

  // A token of row y belongs to the grid's row floor(y h / H).
  Span tokens_of(int axis, int64_t cell) const {
    return {(cell * size[axis] + grid[axis] - 1) / grid[axis],
            ((cell + 1) * size[axis] + grid[axis] - 1) / grid[axis]};
  }
  Span tokens_of(int axis, Span cells) const {
    return {tokens_of(axis, cells.begin).begin, tokens_of(axis, cells.end - 1).end};
  }
  // The cells of a window that are in the grid.
  Span around(int axis, int64_t cell) const {
    return {cell < reach ? 0 : cell - reach,
            cell + reach >= grid[axis] ? grid[axis] : cell + reach + 1};
  }
  // The tokens that a first centre is the mean of, as of an adaptive average pooling.
  Span pooled(int axis, int64_t cell) const {
    return {cell * size[axis] / grid[axis],
            ((cell + 1) * size[axis] + grid[axis] - 1) / grid[axis]};
  }
  // At most so many cells of a window are in the grid, and so many tokens in so many cells.
  int64_t most_around(int axis) const { return window() < grid[axis] ? window() : grid[axis]; }
  int64_t most_tokens(int axis, int64_t cells) const {
    const int64_t most = cells * ((size[axis] + grid[axis] - 1) / grid[axis]);
    return most < size[axis] ? most : size[axis];
  }
};

// Rows of whole vectors of any instruction set. Not a multiple of 1 KB apart: the same channels of
// the tokens of a window must not share cache sets.
inline int64_t token_row(int64_t channels) {
  const int64_t padded = (channels + 15) / 16 * 16;
  return padded * 4 % 1024 == 0 ? padded + 16 : padded;
}

// The arrays of one image.
struct TokenArrays {
  const float* tokens;  // [tokens][row]
  float* centres;       // [cells][row]
  float* affinity;      // [tokens][slots]
};

// Distances of the tokens of some cells of a row to the centres around them.
inline int64_t affinity_row(const TokenMap& m) {
  return (m.most_around(0) * m.most_around(1) + 15) / 16 * 16;
}
inline int64_t affinity_temp_bytes(const TokenMap& m) {
  return m.most_tokens(0, 1) * m.size[1] * affinity_row(m) * 4;
}

// A token and what it adds to two centres side by side.
struct WeightedToken {
  const float* row;
  float weight[2];
};
// The tokens of a pair of centres: those that the first sees alone, both, the second alone.
struct WeightedTokens {
  WeightedToken* begin[4];
  bool moves[2];  // some token has an affinity to the centre
};
inline int64_t means_temp_bytes(const TokenMap& m) {
  const int64_t pairs = (m.grid[1] + 1) / 2;
  const int64_t tokens = m.most_tokens(0, m.window()) * m.most_tokens(1, m.window() + 1);
  return pairs * (static_cast<int64_t>(sizeof(WeightedTokens)) +
                  tokens * static_cast<int64_t>(sizeof(WeightedToken)));
}

// How tokens are rebuilt from refined centres.
struct Reconstruction {
  int64_t cells, channels;
  DType dtype;  // of the refined centres and of the result
  int64_t neighbours;
  float temperature;
  bool l2;  // weights are divided by their L2 norm, else by their sum
};
struct WeightedCentre {
  int64_t index;
  float weight;
};
inline int64_t reconstruction_temp_bytes(const Reconstruction& r) {
  return (r.cells + 15) / 16 * 16 * (4 + static_cast<int64_t>(sizeof(WeightedCentre)));
}

}  // namespace casvit
