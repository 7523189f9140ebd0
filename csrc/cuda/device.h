// What the kernels use of the device, and nothing else: each function is one instruction or a few.
// Compiled by nvcc, or as host C++ by the emulation in tests/cuda_emulation, which supplies the
// same functions. Kernels reach shared memory by byte offsets into the block's buffer, global
// memory by the functions below, so that the emulation sees every access.
#pragma once

#include <cstdint>

#ifdef CASVIT_EMULATED
#include "emulation.h"
#else

#include <cuda_runtime.h>

#define CASVIT_DEVICE __device__ __forceinline__
#define CASVIT_HOST_DEVICE __host__ __device__ __forceinline__
#define CASVIT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace casvit::cuda {

extern __shared__ __align__(128) unsigned char shared_buffer[];

// --- Where a thread is.
CASVIT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CASVIT_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
CASVIT_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
CASVIT_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

// --- Meetings. All threads of the block, all 32 lanes of the warp.
CASVIT_DEVICE void sync_threads() { __syncthreads(); }
CASVIT_DEVICE void sync_warp() { __syncwarp(); }
CASVIT_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
CASVIT_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
CASVIT_DEVICE uint32_t vote_ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
CASVIT_DEVICE bool vote_any(bool v) { return __any_sync(0xffffffffu, v); }

// --- Global memory: V is 1 to 16 bytes, its address a multiple of its size.
template <class V>
CASVIT_DEVICE V load_global(const V* p) {
  return *p;
}
template <class V>
CASVIT_DEVICE V load_constant(const V* p) {
  return __ldg(p);
}  // nobody writes it in this launch
template <class V>
CASVIT_DEVICE void store_global(V* p, V v) {
  *p = v;
}

// --- Shared memory: a byte offset into the block's buffer, a multiple of sizeof(V).
template <class V>
CASVIT_DEVICE V load_shared(uint32_t offset) {
  return *reinterpret_cast<const V*>(shared_buffer + offset);
}
template <class V>
CASVIT_DEVICE void store_shared(uint32_t offset, V v) {
  *reinterpret_cast<V*>(shared_buffer + offset) = v;
}

// The address that ldmatrix and cp.async take; add byte offsets to it.
CASVIT_DEVICE uint32_t shared_base() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_buffer));
}

// --- Clusters of blocks. All threads of the cluster meet; what they wrote before is then seen by
// all. A block that others read may not end before they have: meet once more at the end. Before
// sm_90 a cluster is one block.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
CASVIT_DEVICE int cluster_rank() {
  int r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
CASVIT_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// load_shared of the block with this rank.
template <class V>
CASVIT_DEVICE V load_cluster_shared(int rank, uint32_t offset) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_base() + offset), "r"(rank));
  alignas(16) uint32_t words[4];
  if constexpr (sizeof(V) == 2) {
    uint16_t half;
    asm volatile("ld.shared::cluster.u16 %0, [%1];" : "=h"(half) : "r"(address) : "memory");
    words[0] = half;
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared::cluster.v2.u32 {%0,%1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
  V v;
  memcpy(&v, words, sizeof(V));
  return v;
}
#else
CASVIT_DEVICE int cluster_rank() { return 0; }
CASVIT_DEVICE void cluster_sync() { __syncthreads(); }
template <class V>
CASVIT_DEVICE V load_cluster_shared(int, uint32_t offset) {
  return load_shared<V>(offset);
}
#endif

// --- Copies of N = 8 or 16 bytes from global to shared memory that run on; zeros where not
// `valid`.
template <int N>
CASVIT_DEVICE void copy_async(uint32_t address, const void* from, bool valid) {
  static_assert(N == 8 || N == 16, "cp.async here copies 8 or 16 bytes");
  const int bytes = valid ? N : 0;
  if constexpr (N == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
}
CASVIT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way; others see the data after a sync.
template <int N>
CASVIT_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- ldmatrix: 8x8 matrices of 2-byte elements, a row of 16 bytes from each lane's address. Matrix
// i has the rows of lanes 8 i to 8 i + 7. Lane 4 r + c gets columns 2 c and 2 c + 1 of row r;
// transposed: rows 2 c and 2 c + 1 of column r.
CASVIT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
CASVIT_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
CASVIT_DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

CASVIT_DEVICE uint32_t float_bits(float v) { return __float_as_uint(v); }
CASVIT_DEVICE float bits_float(uint32_t v) { return __uint_as_float(v); }

// Four of the eight bytes of a (0 to 3) and b (4 to 7): a hexadecimal digit of `which` names each,
// the lowest first.
CASVIT_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t which) {
  return __byte_perm(a, b, which);
}

// --- Element types: bits of a 2-byte float, two of them packed in a word, the first in the low
// half.
struct Bf16 {};
struct Fp16 {};

template <class T>
CASVIT_DEVICE uint32_t pack2(float low, float high) {
  uint32_t r;
  if constexpr (__is_same(T, Bf16))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <class T>
CASVIT_DEVICE float low2(uint32_t v) {
  if constexpr (__is_same(T, Bf16)) return __uint_as_float(v << 16);
  float r;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(v));
  return r;
}
template <class T>
CASVIT_DEVICE float high2(uint32_t v) {
  if constexpr (__is_same(T, Bf16)) return __uint_as_float(v & 0xffff0000u);
  float r;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(v));
  return r;
}

// --- mma.m16n8k16: d = a b + d with float32 sums. With g = lane / 4, t = lane % 4: a[0] holds row
// g, columns 2 t and 2 t + 1; a[1] row g + 8; a[2] row g, columns 2 t + 8 and + 9; a[3] row g + 8
// of these. b[0] holds rows 2 t and 2 t + 1 of column g; b[1] rows 2 t + 8 and + 9. d[0], d[1] are
// row g, columns 2 t and 2 t + 1; d[2], d[3] row g + 8.
template <class T>
CASVIT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  if constexpr (__is_same(T, Bf16))
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a b + c, where c is kept.
template <class T>
CASVIT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b,
                       const float (&c)[4]) {
  if constexpr (__is_same(T, Bf16))
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
}

// --- Arithmetic. The larger of x and 0; NaN stays NaN, which fmaxf would hide.
CASVIT_DEVICE float relu(float x) {
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(x));
  return r;
}
// One over 1 + exp(-x), by the fast exponential: a relative error of about 2^-22 (2 + |x|); 0 and 1
// at the ends.
CASVIT_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
// 1 / x, to one unit in the last place.
CASVIT_DEVICE float fast_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
CASVIT_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
// a b + c of both halves of bfloat16 words, rounded once.
CASVIT_DEVICE uint32_t fused_multiply_add2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

}  // namespace casvit::cuda
#endif
