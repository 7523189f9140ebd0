// The depthwise 3x3 convolution on tensor cores.
//
// A unit is 16 bytes of shared memory: two neighbouring pixels (a pair) x four channels (a chunk). Of a
// row, the mma's A holds 16 positions (pairs, anywhere in the tile) x 16 inputs: the units of a pair and
// of the next one, so four pixels x four channels. B holds the taps of one row of the kernel, zero where
// channels differ; its 8 columns are two output pixels x four channels. With input pairs of the pixels
// (2 j - 1, 2 j), position j is the output pixels 2 j and 2 j + 1. Three mma, one for each row of the
// kernel, make 16 positions of a row; a warp sweeps down the rows, so that each A serves three.
//
// (DESIGN: 3 mma for 128 outputs, where a kernel on pixels x 8 channels takes 4 1/2.)
#pragma once

#include "device.h"

namespace casvit::cuda {

constexpr int kChunk = 4;       // channels of a unit
constexpr int kUnitBytes = 16;  // two pixels of a chunk
constexpr int kPositions = 16;  // of an mma

// The tap that B's row k, column n of kernel row `dy` holds: its index in (C, 3, 3) within the chunk, or
// -1 for none. k: pixel k / 4 of four, channel k % 4; n: pixel n / 4 of two, channel n % 4.
CASVIT_DEVICE int tap_of(int dy, int k, int n) {
  const int dx = k / kChunk - n / kChunk;
  return k % kChunk == n % kChunk && dx >= 0 && dx < 3 ? (n % kChunk) * 9 + dy * 3 + dx : -1;
}

// Sweeps ROWS rows down. address: of this lane's A row in the row above the first output row: that of
// position lane % 16, and its next pair for lanes 16 to 31. taps: for each kernel row two words, then
// two more of what rounding left over if EXACT (weights then have twice the mantissa of T). epilogue(row,
// c): c[0], c[1] are position lane / 4, c[2], c[3] position lane / 4 + 8; of these pixel (lane % 4) / 2
// and channels 2 (lane % 2) and the next.
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

}  // namespace casvit::cuda
