#include "pack.h"

#include <atomic>
#include <cmath>
#include <cstring>

namespace casvit {
namespace {

constexpr int64_t MAGIC = 0x4d54414356534143;  // "CASVCATM"
constexpr int64_t HEADER_BYTES = 128;
constexpr int64_t ALIGN = 64;

int64_t aligned(int64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float magnitude;
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  else if (exponent == 0) magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  else magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

float value(const Source& s, int64_t offset) {
  if (s.dtype == DType::F32) return static_cast<const float*>(s.data)[offset];
  const uint16_t bits = static_cast<const uint16_t*>(s.data)[offset];
  if (s.dtype == DType::F16) return half_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}
float at(const Source& s, int64_t i, int64_t j = 0, int64_t y = 0, int64_t x = 0) {
  return value(s, i * s.stride[0] + j * s.stride[1] + y * s.stride[2] + x * s.stride[3]);
}

// Where each array begins, in bytes from the start.
struct Layout {
  int64_t product, qkv_bias, gate[2][4], dwc, dwc_bias, proj, proj_bias, end;
  Layout(const Kernels& k, int64_t C, Product kind) {
    const int64_t blocks = (C + k.lanes - 1) / k.lanes, padded = blocks * k.lanes;
    int64_t next = HEADER_BYTES;
    auto take = [&](int64_t bytes) {
      const int64_t begin = next;
      next = aligned(next + bytes);
      return begin;
    };
    product = take(k.product_weight_bytes(C, blocks, kind));
    qkv_bias = take(3 * padded * 4);
    for (auto& g : gate) {
      g[0] = take(9 * padded * 4);
      g[1] = take(padded * 4);
      g[2] = take(padded * 4);
      g[3] = take(C * padded * 4);
    }
    dwc = take(9 * padded * 4);
    dwc_bias = take(padded * 4);
    proj = take(9 * padded * 4);
    proj_bias = take(padded * 4);
    end = next;
  }
};

// [C, 1, 3, 3] and [C] to [blocks][9][lanes] and [padded]; weight and bias scaled per channel.
template <class Scale, class Shift>
void pack_depthwise(const Source& weight, const Source& bias, int64_t C, int64_t lanes, float* taps,
                    float* biases, Scale scale, Shift shift) {
  for (int64_t c = 0; c < C; ++c) {
    const double factor = scale(c);
    float* to = taps + c / lanes * 9 * lanes + c % lanes;
    for (int64_t t = 0; t < 9; ++t)
      to[t * lanes] = static_cast<float>(at(weight, c, 0, t / 3, t % 3) * factor);
    biases[c] = static_cast<float>(at(bias, c) * factor + shift(c, factor));
  }
}

uint64_t mix(uint64_t hash, uint64_t bits) {
  hash = (hash ^ bits) * 0x9e3779b97f4a7c15ull;
  return hash ^ (hash >> 29);
}

// Fletcher's two sums over 32-bit words, in lanes that the compiler turns into vectors.
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

// Reads a small source whole. Of a large one (a 1x1 convolution) a value in each row, every time in
// another column, so that a change of whole rows or columns shows.
uint64_t sample(const Source& s, uint64_t hash) {
  if (!s.data) return mix(hash, 7);
  const char* data = static_cast<const char*>(s.data);
  const int64_t bytes = s.dtype == DType::F32 ? 4 : 2;
  int64_t step = 1;
  if (s.span <= 16384) {
    const int64_t words = s.span * bytes / 4;
    hash = hash_words(data, words, hash);
    if (words * 4 == s.span * bytes) return hash;
    step = s.span;  // the odd half word
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

uint64_t fingerprint(const Sources& s) {
  uint64_t hash = 1;
  for (const Source* t :
       {&s.qkv_weight, &s.qkv_bias, &s.dwc_weight, &s.dwc_bias, &s.proj_weight, &s.proj_bias})
    hash = sample(*t, hash);
  for (const GateSources& g : s.gate)
    for (const Source* t : {&g.depthwise_weight, &g.depthwise_bias, &g.norm_weight, &g.norm_bias,
                            &g.norm_mean, &g.norm_var, &g.spatial_weight, &g.channel_weight})
      hash = sample(*t, hash);
  return hash;
}

PackedHeader header_of(const Kernels& k, const Sources& s, Product kind) {
  PackedHeader h{};
  h.magic = MAGIC;
  std::memcpy(h.isa, k.name, std::strlen(k.name));  // at most 8 characters
  h.product = static_cast<int64_t>(kind);
  h.channels = s.C;
  h.fingerprint = fingerprint(s);
  h.eps[0] = s.gate[0].eps;
  h.eps[1] = s.gate[1].eps;
  return h;
}

}  // namespace

int64_t packed_bytes(const Kernels& k, int64_t C, Product kind) { return Layout(k, C, kind).end; }

void pack(const Kernels& k, const Sources& s, Product kind, void* packed) {
  char* base = static_cast<char*>(packed);
  const Layout layout(k, s.C, kind);
  const int64_t C = s.C, lanes = k.lanes, blocks = (C + lanes - 1) / lanes, padded = blocks * lanes;
  auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  std::memset(packed, 0, static_cast<size_t>(layout.end));
  const PackedHeader h = header_of(k, s, kind);
  std::memcpy(packed, &h, sizeof h);

  std::vector<float> matrix(static_cast<size_t>(3 * padded * C), 0.0f);
  for (int64_t t = 0; t < 3; ++t)
    for (int64_t o = 0; o < C; ++o) {
      for (int64_t c = 0; c < C; ++c)
        matrix[(t * padded + o) * C + c] = at(s.qkv_weight, t * C + o, c);
      if (s.qkv_bias.data) floats(layout.qkv_bias)[t * padded + o] = at(s.qkv_bias, t * C + o);
    }
  k.product_pack_weights(matrix.data(), C, blocks, kind, base + layout.product);

  for (int i = 0; i < 2; ++i) {
    const GateSources& g = s.gate[i];
    // BN(d) = d * scale + (beta - mean * scale), with scale = gamma / sqrt(var + eps)
    auto scale = [&](int64_t c) {
      const double gamma = g.norm_weight.data ? at(g.norm_weight, c) : 1.0;
      return gamma / std::sqrt(static_cast<double>(at(g.norm_var, c)) + g.eps);
    };
    auto shift = [&](int64_t c, double factor) {
      return (g.norm_bias.data ? at(g.norm_bias, c) : 0.0) - at(g.norm_mean, c) * factor;
    };
    pack_depthwise(g.depthwise_weight, g.depthwise_bias, C, lanes, floats(layout.gate[i][0]),
                   floats(layout.gate[i][1]), scale, shift);
    for (int64_t c = 0; c < C; ++c) {
      floats(layout.gate[i][2])[c] = at(g.spatial_weight, 0, c);
      for (int64_t o = 0; o < C; ++o)
        floats(layout.gate[i][3])[c * padded + o] = at(g.channel_weight, o, c);
    }
  }
  auto one = [](int64_t) { return 1.0; };
  auto nothing = [](int64_t, double) { return 0.0; };
  pack_depthwise(s.dwc_weight, s.dwc_bias, C, lanes, floats(layout.dwc), floats(layout.dwc_bias),
                 one, nothing);
  pack_depthwise(s.proj_weight, s.proj_bias, C, lanes, floats(layout.proj),
                 floats(layout.proj_bias), one, nothing);
}

bool is_current(const Kernels& k, const Sources& s, Product kind, void* packed, int64_t bytes) {
  if (bytes != packed_bytes(k, s.C, kind)) return false;
  PackedHeader* have = static_cast<PackedHeader*>(packed);
  const PackedHeader want = header_of(k, s, kind);
  const bool current = have->magic == want.magic && !std::memcmp(have->isa, want.isa, 8) &&
                       have->product == want.product && have->channels == want.channels &&
                       have->fingerprint == want.fingerprint && have->eps[0] == want.eps[0] &&
                       have->eps[1] == want.eps[1];
  // Several threads may find out at once; all write the same.
  if (!current) __atomic_store_n(&have->stale, int64_t{1}, __ATOMIC_RELAXED);
  return current;
}

WeightsView view(const Kernels& k, int64_t C, Product kind, const void* packed) {
  const char* base = static_cast<const char*>(packed);
  const Layout layout(k, C, kind);
  auto floats = [&](int64_t offset) { return reinterpret_cast<const float*>(base + offset); };
  WeightsView v{};
  v.product = reinterpret_cast<const unsigned char*>(base + layout.product);
  v.qkv_bias = floats(layout.qkv_bias);
  for (int i = 0; i < 2; ++i)
    v.gate[i] = {floats(layout.gate[i][0]), floats(layout.gate[i][1]), floats(layout.gate[i][2]),
                 floats(layout.gate[i][3])};
  v.dwc = floats(layout.dwc);
  v.dwc_bias = floats(layout.dwc_bias);
  v.proj = floats(layout.proj);
  v.proj_bias = floats(layout.proj_bias);
  return v;
}

}  // namespace casvit
