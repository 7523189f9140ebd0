// The device functions of csrc/cuda/depthwise.h, alone: a block for all of a map.
#include "cuda/depthwise.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace py = pybind11;

namespace casvit::cuda {
namespace {

struct ProbeArguments {
  Maps maps;
  Cut cut;
  const uint16_t* qkv;       // the input is its q
  const float* taps;         // (padded, 9)
  const uint16_t* gradient;  // as qkv, of the gradient
  float* out;                // (B, H, W, padded), or of the gradient (padded, 9, 2 pixels, warps)
};

template <class T, int ROWS, bool EXACT>
void forward_probe(const ProbeArguments a) {
  const Cut& c = a.cut;
  const int lane = thread_index() % 32, warp = thread_index() / 32, chunks = a.maps.chunks();
  const Box box{0, -1, -1, c.images, c.strips * ROWS + 2, c.pairs + 1};
  const uint32_t row_bytes = box.pairs * pair_bytes(c);
  load_tile<ROWS>(a.qkv, a.maps, c, box, 0, chunks, 0, 3 * a.maps.padded);
  copy_commit();
  copy_wait<0>();
  sync_threads();
  const Positions positions(c.images, c.strips, c.pairs);
  const int tiles = positions.tiles();
  for (int task = warp; task < tiles * chunks; task += kWarps) {
    const int tile = task / chunks, chunk = task % chunks;
    constexpr int kWords = EXACT ? 4 : 2;
    uint32_t taps[3 * kWords];
    for (int dy = 0; dy < 3; ++dy)
      for (int half = 0; half < 2; ++half) {
        float v[2];
        for (int i = 0; i < 2; ++i) {
          const int tap = tap_of(dy, half * 8 + lane % 4 * 2 + i, lane / 4);
          v[i] = tap < 0 ? 0.0f : load_constant(a.taps + chunk * kChunk * 9 + tap);
        }
        const uint32_t word = pack2<T>(v[0], v[1]);
        taps[dy * kWords + half] = word;
        if (EXACT)
          taps[dy * kWords + 2 + half] = pack2<T>(v[0] - low2<T>(word), v[1] - high2<T>(word));
      }
    const Position p = positions.at(tile * kPositions + lane % 16);
    const uint32_t address = shared_base() + (p.image * box.rows + p.strip * ROWS) * row_bytes +
                             (p.pair + lane / 16) * pair_bytes(c) + chunk * kUnitBytes;
    const float bias[4] = {};
    depthwise<T, ROWS, EXACT>(address, row_bytes, taps, bias, [&](int row, const float (&d)[4]) {
      for (int i = 0; i < 4; ++i) {
        const Position mine = positions.at(tile * kPositions + i / 2 * 8 + lane / 4);
        const int y = mine.strip * ROWS + row, x = 2 * mine.pair + lane % 4 / 2;
        if (mine.valid && y < a.maps.height && x < a.maps.width)
          store_global(
              a.out +
                  ((static_cast<int64_t>(mine.image) * a.maps.height + y) * a.maps.width + x) *
                      a.maps.padded +
                  chunk * kChunk + lane % 2 * 2 + i % 2,
              d[i]);
      }
    });
  }
}

template <class T, int ROWS>
void gradient_probe(const ProbeArguments a) {
  const Cut& c = a.cut;
  const int lane = thread_index() % 32, warp = thread_index() / 32, chunks = a.maps.chunks();
  const Box box{0, -1, -1, c.images, c.strips * ROWS + 2, c.pairs + 1};
  const Box own{0, 0, 0, c.images, c.strips * ROWS, c.pairs};
  const uint32_t row_bytes = box.pairs * pair_bytes(c), own_row_bytes = own.pairs * pair_bytes(c);
  const uint32_t gradient = c.images * box.rows * row_bytes,
                 zeros = gradient + c.images * own.rows * own_row_bytes;
  load_tile<ROWS>(a.qkv, a.maps, c, box, 0, chunks, 0, 3 * a.maps.padded);
  load_tile<ROWS>(a.gradient, a.maps, c, own, 0, chunks, gradient, 3 * a.maps.padded);
  copy_commit();
  if (thread_index() == 0) store_shared(zeros, uint4{0, 0, 0, 0});
  copy_wait<0>();
  sync_threads();
  const Positions positions(c.images, c.strips, c.pairs);
  const int tiles = positions.tiles();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float sums[3][4] = {};
    for (int tile = warp; tile < tiles; tile += kWarps) {
      const Position p = positions.at(tile * kPositions + lane % 8 + lane / 16 * 8);
      const Position q = positions.at(tile * kPositions + lane % 16);
      const uint32_t address = shared_base() + (p.image * box.rows + p.strip * ROWS) * row_bytes +
                               (p.pair + lane / 8 % 2) * pair_bytes(c) + chunk * kUnitBytes;
      const uint32_t from = gradient + (q.image * own.rows + q.strip * ROWS) * own_row_bytes +
                            q.pair * pair_bytes(c) + chunk * kUnitBytes;
      depthwise_gradient<T, ROWS>(sums, address, row_bytes,
                                  shared_base() + (q.valid ? from : zeros),
                                  q.valid ? own_row_bytes : 0);
    }
    for (int dy = 0; dy < 3; ++dy)
      taps_of(sums[dy], lane, [&](int dx, int channel, int pixel, float v) {
        store_global(
            a.out + (((chunk * kChunk + channel) * 9 + dy * 3 + dx) * 2 + pixel) * kWarps + warp,
            v);
      });
  }
}

using Buffer = std::tuple<std::string, uintptr_t, size_t, bool>;

void run(const std::string& what, bool float16, int rows, const std::vector<int>& shape,
         uintptr_t qkv, uintptr_t taps, uintptr_t gradient, uintptr_t out, int schedule,
         const std::vector<Buffer>& buffers) {
  emulation::Session session;
  session.settings.schedule = schedule;
  for (const auto& [name, address, bytes, writable] : buffers)
    session.memory.add(name, reinterpret_cast<const void*>(address), bytes, writable);
  const int padded = (shape.at(1) + 3) / 4 * 4, strips = (shape.at(2) + rows - 1) / rows,
            pairs = (shape.at(3) + 1) / 2;
  const ProbeArguments a{{shape.at(0), shape.at(1), padded, shape.at(2), shape.at(3)},
                         {shape.at(0), strips, pairs, padded / 4, 1, 1, padded / 4 | 1},
                         reinterpret_cast<const uint16_t*>(qkv),
                         reinterpret_cast<const float*>(taps),
                         reinterpret_cast<const uint16_t*>(gradient),
                         reinterpret_cast<float*>(out)};
  const uint32_t pair = a.cut.unit_stride * kUnitBytes;
  const uint32_t shared =
      shape.at(0) * ((strips * rows + 2) * (pairs + 1) + strips * rows * pairs) * pair + 16;
  const auto go = [&](void (*kernel)(ProbeArguments)) {
    launch(kernel, Grid{1, 1, 1}, kThreads, shared, &session, a);
  };
  const auto with = [&](auto type) {
    using T = decltype(type);
    if (what == "gradient") return go(rows == 7 ? gradient_probe<T, 7> : gradient_probe<T, 4>);
    if (what == "exact")
      return go(rows == 7 ? forward_probe<T, 7, true> : forward_probe<T, 4, true>);
    go(rows == 7 ? forward_probe<T, 7, false> : forward_probe<T, 4, false>);
  };
  float16 ? with(Fp16{}) : with(Bf16{});
}

}  // namespace
}  // namespace casvit::cuda

void bind_depthwise(py::module_& m) { m.def("depthwise", &casvit::cuda::run); }
