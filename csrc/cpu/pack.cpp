#include "cpu/pack.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/scratch.h"

namespace casvit {
namespace {

constexpr int64_t MAGIC = 0x4d54414356534143;  // "CASVCATM"
constexpr int64_t ALIGN = 64;

constexpr int64_t aligned(int64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

// Packed weights begin with a header and room for where they came from.
constexpr int64_t SOURCES_BEGIN = aligned(sizeof(PackedHeader));
constexpr int64_t HEADER_BYTES = SOURCES_BEGIN + aligned(sizeof(Sources));

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

bool is_dense(const Source& s, int64_t columns) {
  return s.dtype == DType::F32 && s.stride[0] == columns && s.stride[1] == 1;
}
// to[i] = s[row][i] of a matrix.
void copy_row(const Source& s, int64_t row, int64_t n, float* to) {
  if (s.dtype == DType::F32 && s.stride[1] == 1) {
    std::memcpy(to, static_cast<const float*>(s.data) + row * s.stride[0],
                sizeof(float) * static_cast<size_t>(n));
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = at(s, row, i);
}
// Where each array begins, in bytes from the start: the product's, then the others.
class Offsets {
 public:
  explicit Offsets(int64_t begin) : next_(begin) {}
  int64_t take(int64_t bytes) {
    const int64_t begin = next_;
    next_ = aligned(next_ + bytes);
    return begin;
  }
  int64_t end() const { return next_; }

 private:
  int64_t next_;
};
struct ProductLayout {
  int64_t product, balance, matrix, qkv_bias, end;
  // kept: with the matrix, for longer than the weights stay where they are.
  ProductLayout(const Kernels& k, int64_t C, Product kind, int64_t begin, bool kept) {
    const int64_t blocks = (C + k.lanes - 1) / k.lanes;
    Offsets next(begin);
    product = next.take(k.product_weight_bytes(C, blocks, kind));
    balance = next.take(k.balanced ? padded_balance(C) * 4 : 0);
    matrix = next.take(k.balanced && kept ? 3 * blocks * k.lanes * C * 4 : 0);
    qkv_bias = next.take(3 * blocks * k.lanes * 4);
    end = next.end();
  }
};
struct MixingLayout {
  int64_t gate[2][4], dwc, dwc_bias, proj, proj_bias, end;
  MixingLayout(const Kernels& k, int64_t C, int64_t begin) {
    const int64_t padded = (C + k.lanes - 1) / k.lanes * k.lanes;
    Offsets next(begin);
    for (auto& g : gate) {
      g[0] = next.take(9 * padded * 4);
      g[1] = next.take(padded * 4);
      g[2] = next.take(padded * 4);
      g[3] = next.take(C * padded * 4);
    }
    dwc = next.take(9 * padded * 4);
    dwc_bias = next.take(padded * 4);
    proj = next.take(9 * padded * 4);
    proj_bias = next.take(padded * 4);
    end = next.end();
  }
};
struct Layout {
  ProductLayout product;
  MixingLayout mixing;
  Layout(const Kernels& k, int64_t C, Product kind)
      : product(k, C, kind, HEADER_BYTES, kind == Product::F32), mixing(k, C, product.end) {}
};

thread_local Buffer matrix_buffer, training_buffer;

// [C, 1, 3, 3] and [C] to [blocks][9][lanes] and [padded]; weight and bias scaled per channel.
template <class Scale, class Shift>
void pack_depthwise(const Source& weight, const Source& bias, int64_t C, int64_t lanes, float* taps,
                    float* biases, Scale scale, Shift shift) {
  const int64_t* stride = weight.stride;
  const bool dense =
      weight.dtype == DType::F32 && stride[0] == 9 && stride[2] == 3 && stride[3] == 1;
  float copy[9];
  for (int64_t c = 0; c < C; ++c) {
    const double factor = scale(c);
    float* to = taps + c / lanes * 9 * lanes + c % lanes;
    const float* own = dense ? static_cast<const float*>(weight.data) + c * 9 : copy;
    for (int64_t t = 0; t < 9 && !dense; ++t) copy[t] = at(weight, c, 0, t / 3, t % 3);
    for (int64_t t = 0; t < 9; ++t)
      to[t * lanes] = static_cast<float>(static_cast<double>(own[t]) * factor);
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
  std::strncpy(h.isa, k.name, sizeof h.isa);
  h.product = static_cast<int64_t>(kind);
  h.channels = s.C;
  h.fingerprint = fingerprint(s);
  h.eps[0] = s.gate[0].eps;
  h.eps[1] = s.gate[1].eps;
  return h;
}

bool made_for(const PackedHeader& h, const Kernels& k, int64_t C, Product kind) {
  return h.magic == MAGIC && !std::strncmp(h.isa, k.name, sizeof h.isa) &&
         h.product == static_cast<int64_t>(kind) && h.channels == C;
}

float* floats(void* base, int64_t offset) {
  return reinterpret_cast<float*>(static_cast<char*>(base) + offset);
}

// `base`: zeros where the bias goes. Packed weights are block after block, so threads may pack
// three blocks each. Returns the matrix.
const float* fill_product(const Kernels& k, int64_t C, const Source& weight, const Source& bias,
                          Product kind, const ProductLayout& layout, void* base, const Pool& pool) {
  const int64_t blocks = (C + k.lanes - 1) / k.lanes, padded = blocks * k.lanes;
  const bool as_it_is = C == padded && is_dense(weight, C);
  float* matrix = as_it_is ? nullptr : static_cast<float*>(matrix_buffer.get(3 * padded * C * 4));
  const float* from = as_it_is ? static_cast<const float*>(weight.data) : matrix;
  run(pool, blocks, [&](int64_t i) {
    for (int64_t row = 3 * i * k.lanes; row < 3 * (i + 1) * k.lanes; ++row) {
      const int64_t t = row / padded, o = row % padded;
      if (!as_it_is) {
        if (o < C) copy_row(weight, t * C + o, C, matrix + row * C);
        else std::memset(matrix + row * C, 0, sizeof(float) * static_cast<size_t>(C));
      }
      if (o < C && bias.data) floats(base, layout.qkv_bias)[row] = at(bias, t * C + o);
    }
  });
  float* balance = k.balanced ? floats(base, layout.balance) : nullptr;
  if (balance)
    run(pool, padded_balance(C) / 64,
        [&](int64_t i) { balance_columns(from, 3 * padded, C, 64 * i, 64 * (i + 1), balance); });
  run(pool, blocks, [&](int64_t i) {
    k.product_pack_weights(
        from + 3 * i * k.lanes * C, C, 1, kind, balance,
        static_cast<char*>(base) + layout.product + i * k.product_weight_bytes(C, 1, kind));
  });
  return from;
}

// BN(d) = d * scale + (beta - mean * scale), with scale = gamma / sqrt(var + eps)
double reciprocal_deviation(const GateSources& g, int64_t c) {
  return 1.0 / std::sqrt(static_cast<double>(at(g.norm_var, c)) + g.eps);
}
double gamma(const GateSources& g, int64_t c) {
  return g.norm_weight.data ? at(g.norm_weight, c) : 1.0;
}
double beta(const GateSources& g, int64_t c) { return g.norm_bias.data ? at(g.norm_bias, c) : 0.0; }

double one(int64_t) { return 1.0; }
double nothing(int64_t, double) { return 0.0; }

// `base`: zeros.
void fill_combine(const Kernels& k, const Sources& s, const MixingLayout& layout, void* base) {
  pack_depthwise(s.dwc_weight, s.dwc_bias, s.C, k.lanes, floats(base, layout.dwc),
                 floats(base, layout.dwc_bias), one, nothing);
  pack_depthwise(s.proj_weight, s.proj_bias, s.C, k.lanes, floats(base, layout.proj),
                 floats(base, layout.proj_bias), one, nothing);
}
void fill_mixing(const Kernels& k, const Sources& s, const MixingLayout& layout, void* base,
                 const Pool& pool) {
  const int64_t C = s.C;
  for (int i = 0; i < 2; ++i) {
    const GateSources& g = s.gate[i];
    pack_depthwise(
        g.depthwise_weight, g.depthwise_bias, C, k.lanes, floats(base, layout.gate[i][0]),
        floats(base, layout.gate[i][1]), [&](int64_t c) { return normalizer(g, c); },
        [&](int64_t c, double scale) { return beta(g, c) - at(g.norm_mean, c) * scale; });
    copy_row(g.spatial_weight, 0, C, floats(base, layout.gate[i][2]));
    const bool dense = is_dense(g.channel_weight, C);
    const float* matrix =
        dense_matrix(g.channel_weight, C, C,
                     dense ? nullptr : static_cast<float*>(matrix_buffer.get(C * C * 4)));
    run(pool, divide_up(C, k.lanes), [&](int64_t block) {
      k.pack_channel_gate(matrix, C, block, floats(base, layout.gate[i][3]));
    });
  }
  fill_combine(k, s, layout, base);
}

WeightsView view_mixing(const MixingLayout& layout, const void* packed) {
  void* base = const_cast<void*>(packed);
  WeightsView v{};
  for (int i = 0; i < 2; ++i)
    v.gate[i] = {floats(base, layout.gate[i][0]), floats(base, layout.gate[i][1]),
                 floats(base, layout.gate[i][2]), floats(base, layout.gate[i][3])};
  v.dwc = floats(base, layout.dwc);
  v.dwc_bias = floats(base, layout.dwc_bias);
  v.proj = floats(base, layout.proj);
  v.proj_bias = floats(base, layout.proj_bias);
  return v;
}
void view_product(const ProductLayout& layout, const void* packed, WeightsView& v) {
  v.product = static_cast<const unsigned char*>(packed) + layout.product;
  v.balance = floats(const_cast<void*>(packed), layout.balance);
  v.matrix = floats(const_cast<void*>(packed), layout.matrix);
  v.qkv_bias = floats(const_cast<void*>(packed), layout.qkv_bias);
}

void* zeroed(int64_t bytes) {
  void* to = training_buffer.get(bytes);
  std::memset(to, 0, static_cast<size_t>(bytes));
  return to;
}

}  // namespace

int64_t packed_bytes(const Kernels& k, int64_t C, Product kind) {
  return Layout(k, C, kind).mixing.end;
}

void pack(const Kernels& k, const Sources& s, Product kind, void* packed) {
  const Layout layout(k, s.C, kind);
  std::memset(packed, 0, static_cast<size_t>(layout.mixing.end));
  const PackedHeader h = header_of(k, s, kind);
  std::memcpy(packed, &h, sizeof h);
  const float* matrix =
      fill_product(k, s.C, s.qkv_weight, s.qkv_bias, kind, layout.product, packed, {1, nullptr});
  const ProductLayout& p = layout.product;
  if (p.matrix < p.qkv_bias) {
    const int64_t padded = (s.C + k.lanes - 1) / k.lanes * k.lanes;
    std::memcpy(floats(packed, p.matrix), matrix,
                sizeof(float) * static_cast<size_t>(3 * padded * s.C));
  }
  fill_mixing(k, s, layout.mixing, packed, {1, nullptr});
}

bool is_current(const Kernels& k, const Sources& s, Product kind, void* packed, int64_t bytes) {
  if (bytes != packed_bytes(k, s.C, kind)) return false;
  PackedHeader* have = static_cast<PackedHeader*>(packed);
  const PackedHeader want = header_of(k, s, kind);
  const bool current = made_for(*have, k, s.C, kind) && have->fingerprint == want.fingerprint &&
                       have->eps[0] == want.eps[0] && have->eps[1] == want.eps[1];
  // Several threads may find out at once; all write the same.
  if (!current) __atomic_store_n(&have->stale, int64_t{1}, __ATOMIC_RELAXED);
  return current;
}

bool remember_sources(const Sources& s, void* packed, int64_t bytes) {
  const PackedHeader* have = static_cast<const PackedHeader*>(packed);
  if (bytes < HEADER_BYTES || have->magic != MAGIC || have->channels != s.C) return false;
  std::memcpy(static_cast<char*>(packed) + SOURCES_BEGIN, &s, sizeof s);
  return true;
}
const Sources* sources_of(const Kernels& k, int64_t C, Product kind, const void* packed,
                          int64_t bytes) {
  if (bytes != packed_bytes(k, C, kind)) return nullptr;
  if (!made_for(*static_cast<const PackedHeader*>(packed), k, C, kind)) return nullptr;
  const Sources* s =
      reinterpret_cast<const Sources*>(static_cast<const char*>(packed) + SOURCES_BEGIN);
  return s->C == C ? s : nullptr;
}

WeightsView view(const Kernels& k, int64_t C, Product kind, const void* packed) {
  const Layout layout(k, C, kind);
  WeightsView v = view_mixing(layout.mixing, packed);
  view_product(layout.product, packed, v);
  return v;
}

namespace {
// The bits of a magnitude: they count like it, and in baseline code integers are quicker.
int32_t magnitude(float a) {
  int32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits & 0x7fffffff;
}
// It as a float, but not far from 1 whatever it is.
float near_one(int32_t bits) {
  constexpr int32_t one = 127 << 23, far = 60 << 23;
  if (bits >= 255 << 23) bits = one;  // no number
  bits = bits < one - far ? one - far : bits > one + far ? one + far : bits;
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
}  // namespace

void balance_columns(const float* matrix, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                     float* to) {
  const int64_t stop = end < columns ? end : columns;
  int32_t top[64] = {};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = begin; c < stop; ++c) {
      const int32_t a = magnitude(matrix[row * columns + c]);
      top[c - begin] = a > top[c - begin] ? a : top[c - begin];
    }
  for (int64_t c = begin; c < end; ++c) to[c] = near_one(top[c - begin]);
}
void balance_rows(const float* matrix, int64_t columns, int64_t begin, int64_t end, float* to) {
  for (int64_t row = begin; row < end; ++row) {
    int32_t top = 0;
    for (int64_t c = 0; c < columns; ++c) {
      const int32_t a = magnitude(matrix[row * columns + c]);
      top = a > top ? a : top;
    }
    to[row] = near_one(top);
  }
}

double normalizer(const GateSources& g, int64_t c) {
  return gamma(g, c) * reciprocal_deviation(g, c);
}

void pack_vector(const Source& s, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = at(s, i);
}
const float* dense_matrix(const Source& s, int64_t rows, int64_t columns, float* scratch) {
  if (is_dense(s, columns)) return static_cast<const float*>(s.data);
  for (int64_t row = 0; row < rows; ++row) copy_row(s, row, columns, scratch + row * columns);
  return scratch;
}

WeightsView pack_product(const Kernels& k, int64_t C, const Source& weight, const Source& bias,
                         Product kind, const Pool& pool) {
  const ProductLayout layout(k, C, kind, 0, false);
  void* to = training_buffer.get(layout.end);
  std::memset(floats(to, layout.qkv_bias), 0, static_cast<size_t>(layout.end - layout.qkv_bias));
  const float* matrix = fill_product(k, C, weight, bias, kind, layout, to, pool);
  WeightsView v{};
  view_product(layout, to, v);
  v.matrix = matrix;
  return v;
}

WeightsView pack_mixing(const Kernels& k, const Sources& s, const Pool& pool) {
  const MixingLayout layout(k, s.C, 0);
  const bool padded = s.C % k.lanes != 0;
  void* to = padded ? zeroed(layout.end) : training_buffer.get(layout.end);
  fill_mixing(k, s, layout, to, pool);
  return view_mixing(layout, to);
}

WeightsView pack_combine(const Kernels& k, const Sources& s) {
  MixingLayout layout(k, s.C, 0);
  const int64_t skipped = layout.dwc;  // the gates before
  for (int64_t* at : {&layout.dwc, &layout.dwc_bias, &layout.proj, &layout.proj_bias, &layout.end})
    *at -= skipped;
  void* to = zeroed(layout.end);
  fill_combine(k, s, layout, to);
  WeightsView v{};
  v.dwc = floats(to, layout.dwc);
  v.dwc_bias = floats(to, layout.dwc_bias);
  v.proj = floats(to, layout.proj);
  v.proj_bias = floats(to, layout.proj_bias);
  return v;
}

TrainingGates pack_gates(const Kernels& k, const Sources& s) {
  const int64_t padded = (s.C + k.lanes - 1) / k.lanes * k.lanes;
  float* next = static_cast<float*>(zeroed(2 * 23 * padded * 4));
  auto take = [&](int64_t rows) {
    float* begin = next;
    next += rows * padded;
    return begin;
  };
  TrainingGates gates;
  for (int i = 0; i < 2; ++i) {
    const GateSources& g = s.gate[i];
    float *taps = take(9), *bias = take(1), *normalized = take(9), *normalized_bias = take(1);
    float *gammas = take(1), *betas = take(1), *spatial = take(1);
    pack_depthwise(g.depthwise_weight, g.depthwise_bias, s.C, k.lanes, taps, bias, one, nothing);
    pack_depthwise(
        g.depthwise_weight, g.depthwise_bias, s.C, k.lanes, normalized, normalized_bias,
        [&](int64_t c) { return reciprocal_deviation(g, c); },
        [&](int64_t c, double scale) { return -at(g.norm_mean, c) * scale; });
    for (int64_t c = 0; c < s.C; ++c) {
      gammas[c] = static_cast<float>(gamma(g, c));
      betas[c] = static_cast<float>(beta(g, c));
    }
    copy_row(g.spatial_weight, 0, s.C, spatial);
    gates.gate[i] = {taps, bias, normalized, normalized_bias, gammas, betas, spatial};
  }
  return gates;
}

TrainingGates pack_taps(const Kernels& k, const Sources& s) {
  const int64_t padded = (s.C + k.lanes - 1) / k.lanes * k.lanes;
  float* next = static_cast<float*>(zeroed(2 * 10 * padded * 4));
  TrainingGates gates{};
  for (int i = 0; i < 2; ++i) {
    float* taps = next + i * 10 * padded;
    pack_depthwise(s.gate[i].depthwise_weight, s.gate[i].depthwise_bias, s.C, k.lanes, taps,
                   taps + 9 * padded, one, nothing);
    gates.gate[i].depthwise = taps;
    gates.gate[i].depthwise_bias = taps + 9 * padded;
  }
  return gates;
}

}  // namespace casvit
