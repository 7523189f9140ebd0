#include <cstring>

#include "cpu/sources.h"

namespace casvit {
namespace {

uint64_t mix(uint64_t hash, uint64_t bits) {
  hash = (hash ^ bits) * 0x9e3779b97f4a7c15ull;
  return hash ^ (hash >> 29);
}

// Fletcher's checksum over 32-bit words, in 16 lanes that the compiler vectorises.
uint64_t hash_words(const char* data, int64_t words, uint64_t hash) {
  constexpr int LANES = 16;
  uint32_t sum[LANES] = {}, sum_of_sums[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= words; i += LANES) {
    uint32_t word[LANES];
    std::memcpy(word, data + 4 * i, sizeof word);
    for (int j = 0; j < LANES; ++j) {
      sum[j] += word[j];
      sum_of_sums[j] += sum[j];
    }
  }
  for (int j = 0; j < LANES; ++j) hash = mix(hash, uint64_t{sum_of_sums[j]} << 32 | sum[j]);
  for (; i < words; ++i) {
    uint32_t word;
    std::memcpy(&word, data + 4 * i, 4);
    hash = mix(hash, word);
  }
  return hash;
}

// A small source is hashed whole; of a large one (a 1x1 convolution) one value in each row, at a
// column that differs from row to row, so that changes to a whole row or column show.
uint64_t sample(const Source& s, uint64_t hash) {
  if (!s.data) return mix(hash, 7);
  const char* data = static_cast<const char*>(s.data);
  const int64_t bytes = s.dtype == DType::F32 ? 4 : 2;
  int64_t step = 1;
  if (s.span <= 16384) {
    const int64_t words = s.span * bytes / 4;
    hash = hash_words(data, words, hash);
    if (words * 4 == s.span * bytes) return hash;
    step = s.span;  // the last 16 bits, if odd
    data += 4 * words;
  } else if (s.stride[0] > 2) {
    step = s.stride[0] % 2 ? s.stride[0] - 2 : s.stride[0] - 1;
  }
  const int64_t end = step == s.span ? 1 : s.span;
  uint64_t sums[2] = {};
  for (int64_t i = 0; i < end; i += step) {
    uint32_t bits = 0;
    std::memcpy(&bits, data + bytes * i, static_cast<size_t>(bytes));
    sums[0] += bits;
    sums[1] += sums[0];
  }
  return mix(mix(hash, sums[0]), sums[1]);
}

}  // namespace

uint64_t fingerprint(const Sources& s) {
  uint64_t hash = 1;
#define CASVIT_SAMPLE(prefix, field, ...) hash = sample(s.field, hash);
#define CASVIT_SAMPLE_OF_GATE(prefix, field, ...) hash = sample(gate.field, hash);
  CASVIT_QKV_WEIGHTS(CASVIT_SAMPLE)
  for (const GateSources& gate : s.gate) { CASVIT_GATE_WEIGHTS(CASVIT_SAMPLE_OF_GATE, ) }
  CASVIT_COMBINE_WEIGHTS(CASVIT_SAMPLE)
  return hash;
}

}  // namespace casvit
