// The host's half of csrc/cuda/device.h: the same functions, each access and each meeting checked.
// Barriers and waits take the place of the call as hidden arguments, so that one can be left out at
// run time; other functions take it for their error messages.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"
#include "machine.h"
#include "session.h"

#define CASVIT_DEVICE inline
#define CASVIT_HOST_DEVICE inline
#define CASVIT_KERNEL(threads, blocks) void

// The arguments behind a function's own that say where it is called.
#define CASVIT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace casvit::cuda {

namespace emulation {

inline Machine& machine() { return *Machine::running; }

// Far from zero: an offset taken for an address, or the reverse, is out of bounds.
constexpr uint32_t base = 0x01000000;

template <class V>
constexpr void check_type() {
  static_assert(
      std::is_trivially_copyable_v<V> && sizeof(V) <= 16 && (sizeof(V) & (sizeof(V) - 1)) == 0,
      "an access has 1, 2, 4, 8 or 16 bytes");
}

template <int N>
void ldmatrix(const char* what, uint32_t* r, uint32_t address, bool transposed, const char* file,
              int line) {
  struct Lane {
    uint32_t* r;
    uint32_t address;
  } mine{r, address};
  machine().maybe_preempt();
  machine().doing(what, file, line);
  machine().meet_warp(mine, [&](Lane* const* lanes) {
    Shared& shared = machine().thread().block->shared;
    const Access access = machine().access_of_warp();
    for (int matrix = 0; matrix < N; matrix++)
      for (int row = 0; row < 8; row++) {
        uint16_t elements[8];
        const int from = 8 * matrix + row;
        try {
          shared.load_row(elements, lanes[from]->address - base, access);
        } catch (const std::exception& e) {
          throw std::runtime_error("lane " + std::to_string(from) + "'s row: " + e.what());
        }
        for (int column = 0; column < 8; column++) {
          const Place p = place_of_ldmatrix(matrix, row, column, transposed);
          std::memcpy(reinterpret_cast<unsigned char*>(&lanes[p.lane]->r[p.word]) + 2 * p.half,
                      &elements[column], 2);
        }
      }
  });
}

// v of a lane that `from` gives for each lane.
template <class V, class From>
V exchange(const char* what, V v, From from, const char* file, int line) {
  struct Lane {
    V in, out;
    int from;
  } mine{v, v, 0};
  mine.from = from(machine().doing(what, file, line).lane) & 31;
  machine().meet_warp(mine, [](Lane* const* lanes) {
    for (int lane = 0; lane < 32; lane++) lanes[lane]->out = lanes[lanes[lane]->from]->in;
  });
  return mine.out;
}

}  // namespace emulation

// --- Where a thread is.
inline int thread_index() { return emulation::machine().thread().index; }
inline int block_x() { return emulation::machine().thread().block->x; }
inline int block_y() { return emulation::machine().thread().block->y; }
inline int block_z() { return emulation::machine().thread().block->z; }
inline int cluster_rank() { return emulation::machine().thread().block->rank; }

// --- Meetings.
inline void sync_threads(CASVIT_HERE) {
  auto& m = emulation::machine();
  m.doing("sync_threads", file, line);
  if (!m.skipped()) m.meet_block();
}
inline void sync_warp(CASVIT_HERE) {
  auto& m = emulation::machine();
  m.doing("sync_warp", file, line);
  int nothing = 0;
  if (!m.skipped()) m.meet_warp(nothing, [&](int* const*) { m.warp_synced(); });
}
inline void cluster_sync(CASVIT_HERE) {
  auto& m = emulation::machine();
  m.doing("cluster_sync", file, line);
  if (!m.skipped()) m.meet_cluster();
}
inline float shuffle_xor(float v, int mask, CASVIT_HERE) {
  return emulation::exchange("shuffle_xor", v, [&](int lane) { return lane ^ mask; }, file, line);
}
inline float shuffle(float v, int lane, CASVIT_HERE) {
  return emulation::exchange("shuffle", v, [&](int) { return lane; }, file, line);
}
inline uint32_t vote_ballot(bool v, CASVIT_HERE) {
  struct Lane {
    bool in;
    uint32_t out;
  } mine{v, 0};
  emulation::machine().doing("vote_ballot", file, line);
  emulation::machine().meet_warp(mine, [](Lane* const* lanes) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= static_cast<uint32_t>(lanes[lane]->in) << lane;
    for (int lane = 0; lane < 32; lane++) lanes[lane]->out = votes;
  });
  return mine.out;
}
inline bool vote_any(bool v, CASVIT_HERE) { return vote_ballot(v, file, line) != 0; }

// --- Global memory.
template <class V>
V load_global(const V* p, CASVIT_HERE) {
  emulation::check_type<V>();
  emulation::machine().doing("load_global", file, line);
  emulation::machine().memory.load(p, sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
V load_constant(const V* p, CASVIT_HERE) {
  emulation::check_type<V>();
  emulation::machine().doing("load_constant", file, line);
  emulation::machine().memory.load_constant(p, sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
void store_global(V* p, V v, CASVIT_HERE) {
  emulation::check_type<V>();
  emulation::machine().doing("store_global", file, line);
  emulation::machine().memory.store(p, sizeof(V));
  std::memcpy(p, &v, sizeof(V));
}

// --- Shared memory.
template <class V>
V load_shared(uint32_t offset, CASVIT_HERE) {
  emulation::check_type<V>();
  auto& m = emulation::machine();
  m.maybe_preempt();
  V v;
  m.doing("load_shared", file, line).block->shared.load(&v, offset, sizeof(V), m.access());
  return v;
}
template <class V>
void store_shared(uint32_t offset, V v, CASVIT_HERE) {
  emulation::check_type<V>();
  auto& m = emulation::machine();
  m.maybe_preempt();
  m.doing("store_shared", file, line);
  m.thread().block->shared.store(&v, offset, sizeof(V), m.access());
}
template <class V>
V load_cluster_shared(int rank, uint32_t offset, CASVIT_HERE) {
  emulation::check_type<V>();
  auto& m = emulation::machine();
  m.maybe_preempt();
  emulation::Block* mine = m.doing("load_cluster_shared", file, line).block;
  V v;
  if (rank == mine->rank) mine->shared.load(&v, offset, sizeof(V), m.access());
  else m.block(rank).shared.load_foreign(&v, offset, sizeof(V), m.access());
  return v;
}
inline uint32_t shared_base() { return emulation::base; }

// --- Asynchronous copies.
template <int N>
void copy_async(uint32_t address, const void* from, bool valid, CASVIT_HERE) {
  static_assert(N == 8 || N == 16, "cp.async here copies 8 or 16 bytes");
  auto& m = emulation::machine();
  m.maybe_preempt();
  emulation::Thread& t = m.doing("copy_async", file, line);
  if (valid) m.memory.load(from, N);
  else m.memory.check_alignment(from, N);
  const bool late = m.settings.schedule == 1;
  t.block->shared.copy_begin(address - emulation::base, N, m.access(), late);
  t.copies.push_back({address - emulation::base, N, valid ? from : nullptr, t.group});
  if (!late) t.block->shared.put(valid ? from : nullptr, address - emulation::base, N);
}
inline void copy_commit() { emulation::machine().thread().group++; }
template <int N>
void copy_wait(CASVIT_HERE) {
  auto& m = emulation::machine();
  emulation::Thread& t = m.doing("copy_wait", file, line);
  if (m.skipped()) return;
  size_t done = 0;
  for (; done < t.copies.size() && t.copies[done].group + N < t.group; done++) {
    const emulation::Copy& c = t.copies[done];
    if (m.settings.schedule == 1) t.block->shared.put(c.from, c.offset, c.bytes);
    t.block->shared.copy_end(c.offset, c.bytes, m.access());
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + done);
}

// --- ldmatrix.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, CASVIT_HERE) {
  emulation::ldmatrix<4>("ldmatrix_x4", r, address, false, file, line);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address, CASVIT_HERE) {
  emulation::ldmatrix<4>("ldmatrix_x4_transposed", r, address, true, file, line);
}
inline void ldmatrix_x2_transposed(uint32_t (&r)[2], uint32_t address, CASVIT_HERE) {
  emulation::ldmatrix<2>("ldmatrix_x2_transposed", r, address, true, file, line);
}

inline uint32_t float_bits(float v) { return emulation::bits_of(v); }
inline float bits_float(uint32_t v) { return emulation::float_of(v); }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++)
    r |= static_cast<uint32_t>(both >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return r;
}

// --- Element types.
struct Bf16 {};
struct Fp16 {};

template <class T>
uint32_t pack2(float low, float high) {
  constexpr bool bf16 = std::is_same_v<T, Bf16>;
  const uint32_t l = bf16 ? emulation::to_bf16(low) : emulation::to_fp16(low);
  const uint32_t h = bf16 ? emulation::to_bf16(high) : emulation::to_fp16(high);
  return l | h << 16;
}
template <class T>
float low2(uint32_t v) {
  return std::is_same_v<T, Bf16> ? emulation::from_bf16(v & 0xffff)
                                 : emulation::from_fp16(v & 0xffff);
}
template <class T>
float high2(uint32_t v) {
  return low2<T>(v >> 16);
}

// --- mma.m16n8k16.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, CASVIT_HERE) {
  emulation::Fragments mine{a, b, d};
  emulation::machine().doing("mma", file, line);
  emulation::machine().meet_warp(mine, [](emulation::Fragments* const* lanes) {
    if constexpr (std::is_same_v<T, Bf16>) emulation::multiply<emulation::from_bf16>(lanes);
    else emulation::multiply<emulation::from_fp16>(lanes);
  });
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, const float (&c)[4],
         CASVIT_HERE) {
  std::memcpy(d, c, sizeof(d));
  mma<T>(d, a, b, file, line);
}

// --- Arithmetic.
inline float relu(float x) { return x > 0.0f || std::isnan(x) ? x : 0.0f; }
inline float sigmoid(float x) {
  return static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(x))));
}
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t fused_multiply_add2(uint32_t a, uint32_t b, uint32_t c) {
  return pack2<Bf16>(std::fma(low2<Bf16>(a), low2<Bf16>(b), low2<Bf16>(c)),
                     std::fma(high2<Bf16>(a), high2<Bf16>(b), high2<Bf16>(c)));
}

}  // namespace casvit::cuda
