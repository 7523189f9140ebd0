// The depthwise 3x3 convolution on tensor cores.
//
// A unit is 16 bytes of shared memory: two neighbouring pixels (a pair) x four channels (a chunk).
// Of a row, the mma's A holds 16 positions (pairs, anywhere in the tile) x 16 inputs: the units of
// a pair and of the next one, so four pixels x four channels. B holds the taps of one row of the
// kernel, zero where channels differ; its 8 columns are two output pixels x four channels. With
// input pairs of the pixels (2 j - 1, 2 j), position j is the output pixels 2 j and 2 j + 1. Three
// mma, one for each row of the kernel, make 16 positions of a row; a warp sweeps down the rows, so
// that each A serves three. The transposed convolution is the same with the taps turned round.
//
// (DESIGN: 3 mma for 128 outputs, where a kernel on pixels x 8 channels takes 4 1/2.)
#pragma once

#include "device.h"

namespace casvit::cuda {

constexpr int kChunk = 4;       // channels of a unit
constexpr int kUnitBytes = 16;  // two pixels of a chunk
constexpr int kPositions = 16;  // of an mma

// The tap that B's row k, column n of kernel row `dy` holds: its index in (C, 3, 3) within the
// chunk, or -1 for none. k: pixel k / 4 of four, channel k % 4; n: pixel n / 4 of two, channel n
// % 4.
CASVIT_DEVICE int tap_of(int dy, int k, int n) {
  const int dx = k / kChunk - n / kChunk;
  return k % kChunk == n % kChunk && dx >= 0 && dx < 3 ? (n % kChunk) * 9 + dy * 3 + dx : -1;
}

// Sweeps ROWS rows down. address: of this lane's A row in the row above the first output row: that
// of position lane % 16, and its next pair for lanes 16 to 31. taps: for each kernel row two words,
// then two more of what rounding left over if EXACT (weights then have twice the mantissa of T).
// epilogue(row, c): c[0], c[1] are position lane / 4, c[2], c[3] position lane / 4 + 8; of these
// pixel (lane % 4) / 2 and channels 2 (lane % 2) and the next.
template <class T, int ROWS, bool EXACT, class Epilogue>
CASVIT_DEVICE void depthwise(uint32_t address, uint32_t row_bytes, const uint32_t* taps,
                             const float (&bias)[4], Epilogue&& epilogue) {
  constexpr int kWords = EXACT ? 4 : 2;
  uint32_t a[3][4];
  ldmatrix_x4(a[0], address);
  ldmatrix_x4(a[1], address += row_bytes);
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    ldmatrix_x4(a[(row + 2) % 3], address += row_bytes);
    float c[4];
    mma<T>(c, a[row % 3], taps, bias);
    mma<T>(c, a[(row + 1) % 3], taps + kWords);
    mma<T>(c, a[(row + 2) % 3], taps + 2 * kWords);
    if constexpr (EXACT) {
      mma<T>(c, a[row % 3], taps + 2);
      mma<T>(c, a[(row + 1) % 3], taps + kWords + 2);
      mma<T>(c, a[(row + 2) % 3], taps + 2 * kWords + 2);
    }
    epilogue(row, c);
  }
}

// The gradient of the taps: for each kernel row, A's rows are the four pixels x four channels of
// input that a pair of outputs sees, B's columns the gradient at these two pixels x four channels,
// and the sum goes over positions. Where channels agree, sums[dy] holds a tap; `taps_of` says
// which.
//
// address: of this lane's row of A in the row above the first: that of position lane % 8 + 8 (lane
// / 16), its next pair if lane / 8 is odd. gradient: of its row of B, a unit of the pixels (2 j, 2
// j + 1) of position j = lane % 16 in the first row. A lane without a position points to a unit of
// zeros, with gradient_row_bytes 0.
template <class T, int ROWS>
CASVIT_DEVICE void depthwise_gradient(float (&sums)[3][4], uint32_t address, uint32_t row_bytes,
                                      uint32_t gradient, uint32_t gradient_row_bytes) {
  uint32_t g[ROWS][2];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    ldmatrix_x2_transposed(g[row], gradient);
    gradient += gradient_row_bytes;
  }
#pragma unroll
  for (int row = 0; row < ROWS + 2; ++row) {  // of input, from the one above
    uint32_t a[4];
    ldmatrix_x4_transposed(a, address);
    address += row_bytes;
#pragma unroll
    for (int dy = 0; dy < 3; ++dy)
      if (row - dy >= 0 && row - dy < ROWS) mma<T>(sums[dy], a, g[row - dy]);
  }
}

// Calls at(dx, channel of the chunk, pixel of the pair, value) for those of a lane's four sums that
// belong to a tap: the tap's gradient is the sum over both pixels.
template <class At>
CASVIT_DEVICE void taps_of(const float (&sums)[4], int lane, At&& at) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    const int dx = m / kChunk - n / kChunk;
    if (m % kChunk == n % kChunk && dx >= 0 && dx < 3) at(dx, n % kChunk, n / kChunk, sums[i]);
  }
}

}  // namespace casvit::cuda
