// Small kernels that hold the emulation to what it promises.
#pragma once

#include "cuda/device.h"

namespace casvit::cuda::probes {

// One warp. rows: 32 rows of 16 bytes, one for each lane's address; words: of each lane.
template <int N, bool TRANSPOSED>
CASVIT_KERNEL(32, 1)
ldmatrix_probe(const uint4* rows, uint32_t* words) {
  const int lane = thread_index();
  store_shared(16 * lane, load_global(rows + lane));
  sync_warp();
  uint32_t r[N];
  if constexpr (N == 2) ldmatrix_x2_transposed(r, shared_base() + 16 * lane);
  else if constexpr (TRANSPOSED) ldmatrix_x4_transposed(r, shared_base() + 16 * lane);
  else ldmatrix_x4(r, shared_base() + 16 * lane);
  for (int i = 0; i < N; i++) store_global(words + N * lane + i, r[i]);
}

// One warp: the lanes' fragments as they are in global memory.
template <class T>
CASVIT_KERNEL(32, 1)
mma_probe(const uint4* a, const uint2* b, const float4* c, float4* d) {
  const int lane = thread_index();
  const uint4 a_words = load_global(a + lane);
  const uint2 b_words = load_global(b + lane);
  const float4 start = load_global(c + lane);
  const uint32_t a_of[4] = {a_words.x, a_words.y, a_words.z, a_words.w};
  const uint32_t b_of[2] = {b_words.x, b_words.y};
  const float c_of[4] = {start.x, start.y, start.z, start.w};
  float sum[4];
  mma<T>(sum, a_of, b_of, c_of);
  store_global(d + lane, float4{sum[0], sum[1], sum[2], sum[3]});
}

// d = a b by ldmatrix and mma: a (16, 16) and b (16, 8) row by row.
template <class T>
CASVIT_KERNEL(32, 1)
product_probe(const uint4* a, const uint4* b, float2* d) {
  const int lane = thread_index();
  store_shared(16 * lane, load_global(a + lane));
  if (lane < 16) store_shared(512 + 16 * lane, load_global(b + lane));
  sync_warp();
  uint32_t a_of[4], b_of[2];
  // Matrices: rows 0 to 7, then 8 to 15, of columns 0 to 7, then of 8 to 15.
  ldmatrix_x4(a_of, shared_base() + 32 * (lane % 16) + 16 * (lane / 16));
  ldmatrix_x2_transposed(b_of, shared_base() + 512 + 16 * (lane % 16));
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma<T>(sum, a_of, b_of);
  store_global(d + lane / 4 * 4 + lane % 4, float2{sum[0], sum[1]});
  store_global(d + (lane / 4 + 8) * 4 + lane % 4, float2{sum[2], sum[3]});
}

// Transposes `tiles` tiles of 16 x 16 floats, one after another, in one place.
CASVIT_KERNEL(256, 1)
transpose_probe(const float* from, float* to, int tiles) {
  const int thread = thread_index(), row = thread / 16, column = thread % 16;
  for (int tile = 0; tile < tiles; tile++) {
    store_shared(4 * thread, load_constant(from + tile * 256 + thread));
    sync_threads();
    store_global(to + tile * 256 + thread, load_shared<float>(4 * (16 * column + row)));
    sync_threads();
  }
}

// Sums the tiles of a block, 64 x 4 floats each, mirrored; two are under way at a time.
CASVIT_KERNEL(64, 1)
double_buffer_probe(const float4* from, float4* to, int tiles) {
  const int thread = thread_index();
  from += block_x() * tiles * 64;
  const auto start = [&](int tile) {
    if (tile < tiles)
      copy_async<16>(shared_base() + tile % 2 * 1024 + 16 * thread, from + tile * 64 + thread,
                     true);
    copy_commit();
  };
  float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
  start(0);
  for (int tile = 0; tile < tiles; tile++) {
    start(tile + 1);
    copy_wait<1>();
    sync_threads();
    const float4 v = load_shared<float4>(tile % 2 * 1024 + 16 * (63 - thread));
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    sync_threads();
  }
  store_global(to + block_x() * 64 + thread, sum);
}

// Warps: mirror 32 values twice through one place, then their sum, and who is positive.
CASVIT_KERNEL(128, 1)
warp_probe(const float* from, float* mirrored, float* sums, uint32_t* votes) {
  const int thread = thread_index(), lane = thread % 32, base = 4 * (thread - lane);
  float v = load_global(from + thread);
  for (int turn = 0; turn < 3; turn++) {
    store_shared(base + 4 * lane, v);
    sync_warp();
    v = load_shared<float>(base + 4 * (31 - lane));
    sync_warp();
  }
  store_global(mirrored + thread, v);
  float sum = v;
  for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
  store_global(sums + thread, sum + shuffle(v, 5) + 2.0f * shuffle_xor(v, 9));
  store_global(votes + thread, vote_ballot(v > 0.0f) + (vote_any(v > 1e6f) ? 1u : 0u));
}

// Each block reads what the next one of its cluster wrote, mirrored, and half of its own, too.
CASVIT_KERNEL(64, 1)
cluster_probe(const float* from, float* to, int blocks, int turns) {
  const int thread = thread_index(), index = block_x() * 64 + thread;
  float v = load_global(from + index);
  for (int turn = 0; turn < turns; turn++) {
    store_shared(4 * thread, v);
    cluster_sync();
    const int rank = (cluster_rank() + 1) % blocks;
    v = load_cluster_shared<float>(rank, 4 * (63 - thread)) +
        0.5f * load_shared<float>(4 * (63 - thread));
    cluster_sync();
  }
  store_global(to + index, v);
}

// What kernels should not do, by number; the test names them. 64 threads, 1024 bytes of shared
// memory.
CASVIT_KERNEL(64, 1)
fault_probe(int fault, const float* input, float* output) {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const bool one = thread == 37;
  uint32_t r[4] = {0, 0, 0, 0};
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  switch (fault) {
    case 0: store_shared(one ? 1024 : 4 * thread, 1.0f); break;
    case 1: store_shared(one ? 0xfffffffcu : 4 * thread, 1.0f); break;
    case 2: store_shared(one ? 1020u : 8 * thread, uint2{1, 2}); break;  // its end is outside
    case 3: store_shared(one ? 150u : 4 * thread, 1.0f); break;
    case 4: load_shared<float>(4 * thread); break;
    case 5: load_global(input + (one ? 64 : thread)); break;
    case 6: load_global(reinterpret_cast<const float4*>(input + (one ? 62 : 0))); break;
    case 7: load_global(reinterpret_cast<const float2*>(input + (one ? 1 : 0))); break;
    case 8: store_global(const_cast<float*>(input), 1.0f); break;
    case 9:
      store_global(output + thread, 1.0f);
      load_constant(output + thread);
      break;
    case 10:
      load_constant(output + thread);
      store_global(output + thread, 1.0f);
      break;
    case 11:  // lanes in two branches
      if (lane < 16) sync_warp();
      else shuffle(1.0f, 0);
      break;
    case 12:
      if (lane < 16) mma<Bf16>(d, {1, 1, 1, 1}, r);
      else mma<Bf16>(d, {2, 2, 2, 2}, r);
      break;
    case 13:
      if (lane != 5) sync_warp();
      break;
    case 14:
      if (warp == 1) return;
      sync_threads();
      break;
    case 15:
      if (lane < 16) sync_threads();
      else sync_threads();
      break;
    case 16: ldmatrix_x4(r, 16 * lane); break;  // an offset for an address
    case 17: ldmatrix_x4(r, shared_base() + (lane == 9 ? 1016 : 0)); break;
    case 18: copy_async<8>(16 * lane, input, true); break;
    case 19: copy_async<16>(shared_base() + 16 * thread, input + (one ? 2 : 0), true); break;
    case 20: load_cluster_shared<float>(1, 0); break;
    case 21: copy_async<16>(shared_base() + 16 * thread, input + 1000, false); break;  // is fine
    case 22: ldmatrix_x4(r, shared_base()); break;                                     // is fine
    case 23: copy_async<16>(shared_base() + 16 * thread, input + 1, false); break;
    case 24: load_global(reinterpret_cast<const float4*>(input + 60)); break;  // of 62
  }
}

// Two accesses and what lies between them, by number; the test names them. Thread 0
// does the first access to byte 0 to 7, thread `other` the second to byte `offset` and the next.
enum Touch { kStore, kLoad, kMatrix, kCopy };
CASVIT_KERNEL(64, 1)
race_probe(int first, int second, int other, int offset, int between, const float* input) {
  const int thread = thread_index();
  for (int i = thread; i < 64; i += 64) store_shared(8 * i, uint2{0, 0});
  sync_threads();
  const auto touch = [&](int what, int at, int who) {
    uint32_t r[4];
    if (what == kMatrix && thread / 32 == who / 32) ldmatrix_x4(r, shared_base());
    if (thread != who) return;
    if (what == kStore) store_shared(at, uint16_t{1});
    if (what == kLoad) load_shared<uint16_t>(at);
    if (what == kCopy) copy_async<8>(shared_base(), input, true);
  };
  touch(first, 0, 0);
  if (between == 1) sync_warp();
  if (between == 2) sync_threads();
  if (between == 3) {  // a shuffle and the other warp's barriers order nothing
    shuffle(1.0f, 0);
    if (thread >= 32) sync_warp();
  }
  if (between == 4) copy_wait<0>();  // of a copy that belongs to no group yet
  if (between >= 5) copy_commit();
  if (between == 5) copy_wait<1>();
  if (between == 8) sync_threads();  // too early
  if (between >= 6) copy_wait<0>();
  if (between == 7) sync_threads();
  touch(second, offset, other);
}

// Two threads load the same word, then the other one stores to it; between is as above.
CASVIT_KERNEL(64, 1)
readers_probe(int other, int between) {
  const int thread = thread_index();
  store_shared(4 * thread, 0.0f);
  sync_threads();
  if (thread == 0) load_shared<float>(0);
  if (between == 1) sync_warp();
  if (between == 2) sync_threads();
  if (thread == other) {
    load_shared<float>(0);
    store_shared(0, 1.0f);
  }
}

// What ldmatrix reads that nobody wrote, and what a copy's target holds before any wait. Races.
CASVIT_KERNEL(32, 1)
poison_probe(const float4* input, uint32_t* output) {
  const int lane = thread_index();
  output += block_x() * 64;
  uint32_t r[4];
  ldmatrix_x4(r, shared_base() + 16 * lane);
  store_global(output + lane, r[lane % 4]);
  store_shared(512 + 16 * lane, uint4{0, 0, 0, 0});
  copy_async<16>(shared_base() + 512 + 16 * lane, input + lane, true);
  store_global(output + 32 + lane, load_shared<uint32_t>(512 + 16 * lane));
  store_shared(16 * lane, uint4{0, 0, 0, 0});
}

// A store by block 0 and a load of it by block 1, and what lies between: 0 nothing, 1 sync_threads,
// 2 cluster_sync.
CASVIT_KERNEL(32, 1)
cluster_race_probe(bool store_first, int between) {
  const int thread = thread_index(), rank = cluster_rank();
  store_shared(4 * thread, 0.0f);
  cluster_sync();
  for (int turn = 0; turn < 2; turn++) {
    if (store_first == (turn == 0)) {
      if (rank == 0 && thread == 3) store_shared(12, 1.0f);
    } else {
      if (rank == 1 && thread == 5) load_cluster_shared<float>(0, 12);
    }
    if (turn == 0 && between == 1) sync_threads();
    if (turn == 0 && between == 2) cluster_sync();
  }
  cluster_sync();
}

// A thread's own accesses never race.
CASVIT_KERNEL(64, 1)
own_probe(float* output) {
  const int thread = thread_index();
  float v = 0.0f;
  for (int i = 0; i < 4; i++) {
    store_shared(4 * thread, v + 1.0f);
    v = load_shared<float>(4 * thread);
  }
  store_global(output + thread, v);
}

// Many accesses, for a look at the time: `count` rounds of 16-byte accesses by 256 threads.
CASVIT_KERNEL(256, 1)
work_probe(int count) {
  const int thread = thread_index();
  for (int i = 0; i < count; i++) {
    store_shared(16 * (thread + 256 * (i % 14)), uint4{1, 2, 3, 4});
    sync_threads();
    load_shared<uint4>(16 * (255 - thread + 256 * (i % 14)));
  }
}

}  // namespace casvit::cuda::probes
