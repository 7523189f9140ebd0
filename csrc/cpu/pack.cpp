#include "cpu/pack.h"

#include <algorithm>
#include <cstring>

#include "cpu/packed_layout.h"

namespace casvit {
namespace {

constexpr int64_t MAGIC = 0x4d54414356534143;  // "CASVCATM"

// Packed weights begin with a header and room for the sources.
constexpr int64_t SOURCES_BEGIN = aligned(sizeof(PackedHeader));
constexpr int64_t HEADER_BYTES = SOURCES_BEGIN + aligned(sizeof(Sources));

struct Layout {
  QkvLayout qkv;
  MixingLayout mixing;
  Layout(const Kernels& k, int64_t C, Precision precision)
      : qkv(k, C, precision, HEADER_BYTES, precision == Precision::F32), mixing(k, C, qkv.end) {}
};

PackedHeader header_of(const Kernels& k, const Sources& s, Precision precision) {
  PackedHeader h{};
  h.magic = MAGIC;
  std::memcpy(h.isa, k.name, std::min(std::strlen(k.name), sizeof h.isa));
  h.precision = static_cast<int64_t>(precision);
  h.channels = s.C;
  h.fingerprint = fingerprint(s);
  h.eps[0] = s.gate[0].eps;
  h.eps[1] = s.gate[1].eps;
  return h;
}

bool made_for(const PackedHeader& h, const Kernels& k, int64_t C, Precision precision) {
  return h.magic == MAGIC && !std::strncmp(h.isa, k.name, sizeof h.isa) &&
         h.precision == static_cast<int64_t>(precision) && h.channels == C;
}

}  // namespace

int64_t packed_bytes(const Kernels& k, int64_t C, Precision precision) {
  return Layout(k, C, precision).mixing.end;
}

void pack(const Kernels& k, const Sources& s, Precision precision, void* packed) {
  const Layout layout(k, s.C, precision);
  std::memset(packed, 0, static_cast<size_t>(layout.mixing.end));
  const PackedHeader h = header_of(k, s, precision);
  std::memcpy(packed, &h, sizeof h);
  const float* matrix =
      fill_qkv(k, s.C, s.qkv_weight, s.qkv_bias, precision, layout.qkv, packed, {1, nullptr});
  const QkvLayout& p = layout.qkv;
  if (p.matrix < p.bias) {
    const int64_t padded = (s.C + k.lanes - 1) / k.lanes * k.lanes;
    std::memcpy(floats(packed, p.matrix), matrix,
                sizeof(float) * static_cast<size_t>(3 * padded * s.C));
  }
  fill_mixing(k, s, layout.mixing, packed, {1, nullptr});
}

bool is_current(const Kernels& k, const Sources& s, Precision precision, void* packed,
                int64_t bytes) {
  if (bytes != packed_bytes(k, s.C, precision)) return false;
  PackedHeader* have = static_cast<PackedHeader*>(packed);
  const PackedHeader want = header_of(k, s, precision);
  const bool current = made_for(*have, k, s.C, precision) &&
                       have->fingerprint == want.fingerprint && have->eps[0] == want.eps[0] &&
                       have->eps[1] == want.eps[1];
  // Threads that find out at once all write the same.
  if (!current) __atomic_store_n(&have->stale, int64_t{1}, __ATOMIC_RELAXED);
  return current;
}

bool remember_sources(const Sources& s, void* packed, int64_t bytes) {
  const PackedHeader* have = static_cast<const PackedHeader*>(packed);
  if (bytes < HEADER_BYTES || have->magic != MAGIC || have->channels != s.C) return false;
  std::memcpy(static_cast<char*>(packed) + SOURCES_BEGIN, &s, sizeof s);
  return true;
}
const Sources* sources_of(const Kernels& k, int64_t C, Precision precision, const void* packed,
                          int64_t bytes) {
  if (bytes != packed_bytes(k, C, precision)) return nullptr;
  if (!made_for(*static_cast<const PackedHeader*>(packed), k, C, precision)) return nullptr;
  const Sources* s =
      reinterpret_cast<const Sources*>(static_cast<const char*>(packed) + SOURCES_BEGIN);
  return s->C == C ? s : nullptr;
}

WeightsView view(const Kernels& k, int64_t C, Precision precision, const void* packed) {
  const Layout layout(k, C, precision);
  WeightsView v = view_mixing(layout.mixing, packed);
  view_qkv(layout.qkv, packed, v);
  return v;
}

}  // namespace casvit
