#include "cpu/tokens/cluster.h"

#include "cpu/scratch.h"

namespace casvit {
namespace {

thread_local Buffer rows_buffer, temp_buffer;
constexpr int64_t KEEP_BYTES = int64_t{256} << 20;

int64_t bytes_of(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

// A few images that go through the phases together, and the tasks of each phase. No result depends
// on how tasks are cut, nor on the images beside one.
struct Group {
  const TokenKernels& k;
  const TokenMap& m;
  const ThreadPool& pool;
  int64_t images;
  float* tokens;    // [images][tokens][row]
  float* centres;   // [images][cells][row]
  float* affinity;  // [images][tokens][slots]

  TokenArrays of(int64_t image) const {
    return {tokens + image * m.tokens() * m.row, centres + image * m.cells() * m.row,
            affinity + image * m.tokens() * m.slots()};
  }
  // f(arrays, row of cells, begin, end), from an even cell on: whole rows, or parts of them where
  // threads outnumber the rows.
  template <class F>
  void each_row(const F& f) const {
    const int64_t rows = images * m.grid[0], pairs = divide_up(m.grid[1], 2);
    const int64_t wanted = pool.threads == 1 ? 1 : divide_up(4 * pool.threads, rows);
    const int64_t parts = wanted < pairs ? wanted : pairs;
    parallel_for(pool, rows * parts, [&](int64_t i) {
      const int64_t row = i / parts, part = i % parts;
      const int64_t begin = part * pairs / parts * 2, end = (part + 1) * pairs / parts * 2;
      f(of(row / m.grid[0]), row % m.grid[0], begin, end < m.grid[1] ? end : m.grid[1]);
    });
  }
  void load(const TokenBatch& x, int64_t first) const {
    parallel_for(pool, images * m.size[0], [&](int64_t i) {
      const int64_t image = i / m.size[0], begin = i % m.size[0] * m.size[1];
      const char* from =
          static_cast<const char*>(x.data) +
          ((first + image) * x.image_stride + begin * x.token_stride) * bytes_of(x.dtype);
      float* to = tokens + (image * m.tokens() + begin) * m.row;
      for (int64_t t = 0; t < m.size[1]; ++t)
        k.widen(from + t * x.token_stride * bytes_of(x.dtype), x.dtype, m.channels, m.row,
                to + t * m.row);
    });
  }
  void pool_centres() const {
    each_row([&](const TokenArrays& a, int64_t row, int64_t begin, int64_t end) {
      k.pool(m, a, row, begin, end);
    });
  }
  void iterate(float temperature) const {
    each_row([&](const TokenArrays& a, int64_t row, int64_t begin, int64_t end) {
      k.affinities(m, a, temperature, row, begin, end,
                   static_cast<float*>(temp_buffer.get(affinity_temp_bytes(m))));
    });
    each_row([&](const TokenArrays& a, int64_t row, int64_t begin, int64_t end) {
      k.means(m, a, row, begin, end, temp_buffer.get(means_temp_bytes(m)));
    });
  }
  void store(DType dtype, char* to) const {
    const int64_t bytes = m.channels * bytes_of(dtype);
    each_row([&](const TokenArrays& a, int64_t row, int64_t begin, int64_t end) {
      const int64_t image = (a.centres - centres) / (m.cells() * m.row);
      for (int64_t cell = row * m.grid[1] + begin; cell < row * m.grid[1] + end; ++cell)
        k.narrow(a.centres + cell * m.row, dtype, m.channels,
                 to + (image * m.cells() + cell) * bytes);
    });
  }
};

}  // namespace

void cluster_tokens(const Kernels& kernels, TokenMap m, const TokenBatch& x, int64_t iterations,
                    float temperature, void* centres, float* affinity, const ThreadPool& given) {
  ThreadPool pool = given;
  if (in_forked_child() || x.images * m.tokens() * m.channels < 4096) pool.threads = 1;
  m.row = token_row(m.channels);
  // As many images at a time as keep the threads busy: what they need stays in the caches.
  int64_t together = divide_up(4 * pool.threads, m.grid[0]);
  if (together > x.images) together = x.images;
  float* tokens =
      static_cast<float*>(rows_buffer.get(together * (m.tokens() + m.cells()) * m.row * 4));
  for (int64_t first = 0; first < x.images; first += together) {
    const int64_t images = x.images - first < together ? x.images - first : together;
    const Group group{kernels.tokens,
                      m,
                      pool,
                      images,
                      tokens,
                      tokens + together * m.tokens() * m.row,
                      affinity + first * m.tokens() * m.slots()};
    group.load(x, first);
    group.pool_centres();
    for (int64_t i = 0; i < iterations; ++i) group.iterate(temperature);
    group.store(x.dtype,
                static_cast<char*>(centres) + first * m.cells() * m.channels * bytes_of(x.dtype));
  }
  rows_buffer.release_if_over(KEEP_BYTES);
}

}  // namespace casvit
