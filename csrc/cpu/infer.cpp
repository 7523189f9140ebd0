#include "cpu/infer.h"

#include "cpu/scratch.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace casvit {
namespace {

bool forked = false;
#if !defined(_WIN32)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Kept between calls, one set for each thread.
thread_local Buffer planes_buffer, small_buffer, temp_buffer, packing_buffer;
constexpr int64_t KEEP_BYTES = int64_t{256} << 20;

// A group of images that go through the phases together, and its scratch.
struct Group {
  const Kernels& k;
  const Geometry& g;
  const WeightsView& w;
  Precision precision;
  const Input& x;
  const Output& out;
  int64_t first, images;
  int64_t image_floats;
  float* planes;   // [images][q, k, v][blocks] planes
  float* spatial;  // [images][2][pixels]
  float* sums;     // [images][2][strips][padded]
  float* pooled;   // [2][images][padded]
  float* gates;    // [2][images][padded]
  Strips strips;

  Group(const Kernels& k, const Geometry& g, const WeightsView& w, Precision precision,
        const Input& x, const Output& out, int64_t first, int64_t images)
      : k(k),
        g(g),
        w(w),
        precision(precision),
        x(x),
        out(out),
        first(first),
        images(images),
        image_floats(3 * g.blocks * g.plane),
        strips(make_strips(g)) {
    planes = planes_buffer.planes(g, images, image_floats);
    const int64_t spatial_floats = images * 2 * g.pixels() + 16;
    const int64_t sum_floats = images * 2 * strips.count * g.padded();
    const int64_t vector_floats = 2 * images * g.padded();
    spatial = static_cast<float*>(
        small_buffer.get((spatial_floats + sum_floats + 2 * vector_floats) * 4));
    sums = spatial + spatial_floats;
    pooled = sums + sum_floats;
    gates = pooled + vector_floats;
  }

  void project(int64_t begin, int64_t end, int64_t block_begin, int64_t block_end) const {
    const PixelRun run{&x, &g, first, begin, end};
    void* temp = temp_buffer.get(k.qkv.temp_bytes(g.C, precision, end - begin));
    k.qkv.gemm(run, w, precision, block_begin, block_end, planes, image_floats, temp);
  }
  void spatial_gate(int64_t image, int64_t which, int64_t strip) const {
    float* temp = static_cast<float*>(temp_buffer.get(spatial_gate_temp_floats(g) * 4));
    k.spatial_gate(g, w.gate[which], planes + image * image_floats + which * g.blocks * g.plane,
                   strips, strip, spatial + (image * 2 + which) * g.pixels(),
                   sums + ((image * 2 + which) * strips.count + strip) * g.padded(), temp);
  }
  void spatial_mean() const {
    const float scale = 1.0f / static_cast<float>(g.pixels());
    for (int64_t which = 0; which < 2; ++which)
      for (int64_t image = 0; image < images; ++image) {
        float* to = pooled + (which * images + image) * g.padded();
        const float* from = sums + (image * 2 + which) * strips.count * g.padded();
        for (int64_t c = 0; c < g.padded(); ++c) to[c] = from[c];
        for (int64_t s = 1; s < strips.count; ++s)
          for (int64_t c = 0; c < g.padded(); ++c) to[c] += from[s * g.padded() + c];
        for (int64_t c = 0; c < g.padded(); ++c) to[c] *= scale;
      }
  }
  void channel_gate(int64_t which, int64_t begin, int64_t end) const {
    const int64_t offset = which * images * g.padded();
    k.channel_gate(g, w.gate[which], pooled + offset, gates + offset, images, begin, end);
  }
  void combine(int64_t image, int64_t block, int64_t y_begin, int64_t y_end) const {
    float* temp = static_cast<float*>(temp_buffer.get(combine_temp_floats(g) * 4));
    const float* const gate[2] = {gates + image * g.padded(),
                                  gates + (images + image) * g.padded()};
    k.combine(g, w, planes + image * image_floats, spatial + image * 2 * g.pixels(), gate, block,
              y_begin, y_end, out, first + image, temp);
  }

  void all_on_this_thread() const {
    if (strips.count > strips.across) {
      project_and_gate(0, rows_of_strips());
    } else {
      project(0, images * g.pixels(), 0, 3 * g.blocks);
      for (int64_t image = 0; image < images; ++image) spatial_gates(image, 0);
    }
    spatial_mean();
    for (int64_t which = 0; which < 2; ++which) channel_gate(which, 0, g.blocks);
    for (int64_t image = 0; image < images; ++image)
      for (int64_t block = 0; block < g.blocks; ++block) combine(image, block, 0, g.H);
  }
  // Rows of strips, of all images as one sequence.
  int64_t down() const { return strips.count / strips.across; }
  int64_t rows_of_strips() const { return images * down(); }
  // Whether the halo of a row lies within [begin, end) or outside of the image.
  bool has_halo(int64_t row, int64_t begin, int64_t end) const {
    return (row % down() == 0 || row > begin) && (row % down() == down() - 1 || row + 1 < end);
  }

  // One row after the other, and a row's gates as soon as the next row is there, whose first pixels
  // are its halo: q and k are still in the L2 cache. Rows that lack their halo are left out.
  void project_and_gate(int64_t begin, int64_t end) const {
    const auto gates = [&](int64_t row) {
      if (row >= begin && has_halo(row, begin, end)) spatial_gates(row / down(), row % down());
    };
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % down() * strips.rows;
      const int64_t y_end = y + strips.rows < g.H ? y + strips.rows : g.H;
      const int64_t first_pixel = row / down() * g.pixels();
      project(first_pixel + y * g.W, first_pixel + y_end * g.W, 0, 3 * g.blocks);
      gates(row - 1);
    }
    gates(end - 1);
  }

  // Each thread has a band of rows. Those at a cut, whose halo is another thread's, come after all.
  void project_and_gate_in_bands(const ThreadPool& pool) const {
    const auto band = [&](int64_t i) { return i * rows_of_strips() / pool.threads; };
    parallel_for(pool, pool.threads, [&](int64_t i) { project_and_gate(band(i), band(i + 1)); });
    // Two rows at most for each cut, its last and its first: a task for each, q and k.
    parallel_for(pool, pool.threads * 4, [&](int64_t i) {
      const int64_t begin = band(i / 4), end = band(i / 4 + 1);
      const int64_t row = i % 4 < 2 ? begin : end - 1;
      if (has_halo(row, begin, end)) return;
      for (int64_t j = 0; j < strips.across; ++j)
        spatial_gate(row / down(), i % 2, row % down() * strips.across + j);
    });
  }
  void spatial_gates(int64_t image, int64_t row_of_strips) const {
    for (int64_t which = 0; which < 2; ++which)
      for (int64_t i = 0; i < strips.across; ++i)
        spatial_gate(image, which, row_of_strips * strips.across + i);
  }
};

// Small maps, which stay in the caches between the two.
void project_then_gate(const Group& group, const ThreadPool& pool) {
  const Geometry& g = group.g;
  const int64_t threads = pool.threads, pixels = group.images * g.pixels();
  int64_t parts = pixels / 64 < threads ? pixels / 64 : threads;
  if (parts < 1) parts = 1;
  const int64_t part = divide_up(divide_up(pixels, parts), 16) * 16;
  parts = divide_up(pixels, part);
  const int64_t block_part = divide_up(divide_up(3 * g.blocks, divide_up(threads, parts)), 2) * 2;
  const int64_t block_parts = divide_up(3 * g.blocks, block_part);
  parallel_for(pool, parts * block_parts, [&](int64_t i) {
    const int64_t begin = i / block_parts * part, block = i % block_parts * block_part;
    const int64_t end = begin + part < pixels ? begin + part : pixels;
    const int64_t block_end = block + block_part < 3 * g.blocks ? block + block_part : 3 * g.blocks;
    group.project(begin, end, block, block_end);
  });
  const int64_t strips = group.strips.count;
  parallel_for(pool, group.images * strips * 2,
               [&](int64_t i) { group.spatial_gate(i / (2 * strips), i % 2, i / 2 % strips); });
}

// Few images: every phase is spread over the threads. Tasks count along the rows, and the pool
// gives each thread a run of them, so a thread mostly reads what it has written itself.
void by_phases(const Group& group, const ThreadPool& pool) {
  const Geometry& g = group.g;
  const int64_t threads = pool.threads;
  if (group.rows_of_strips() >= 8 * threads) group.project_and_gate_in_bands(pool);
  else project_then_gate(group, pool);
  group.spatial_mean();
  const int64_t gate_part =
      divide_up(2 * g.blocks, threads) < g.blocks ? divide_up(2 * g.blocks, threads) : g.blocks;
  const int64_t gate_parts = divide_up(g.blocks, gate_part);
  parallel_for(pool, 2 * gate_parts, [&](int64_t i) {
    const int64_t begin = i % gate_parts * gate_part;
    const int64_t end = begin + gate_part < g.blocks ? begin + gate_part : g.blocks;
    group.channel_gate(i / gate_parts, begin, end);
  });
  // Bands of rows of one large image. All blocks compute the three halo rows of a cut twice, so
  // bands have at least 14 rows.
  const int64_t band = divide_up(g.H, threads);
  if (group.images == 1 && band >= 14) {
    parallel_for(pool, divide_up(g.H, band), [&](int64_t i) {
      const int64_t y_end = (i + 1) * band < g.H ? (i + 1) * band : g.H;
      for (int64_t block = 0; block < g.blocks; ++block) group.combine(0, block, i * band, y_end);
    });
    return;
  }
  // Else the rows of all blocks as one sequence, cut into equal pieces: only blocks that are cut
  // compute halo rows twice.
  const int64_t rows = group.images * g.blocks * g.H;
  const int64_t pieces = rows / 4 < threads ? divide_up(rows, 4) : threads;
  parallel_for(pool, pieces, [&](int64_t i) {
    const int64_t stop = (i + 1) * rows / pieces;
    for (int64_t row = i * rows / pieces; row < stop;) {
      const int64_t block = row / g.H, y = row % g.H;
      const int64_t y_end = y + stop - row < g.H ? y + stop - row : g.H;
      group.combine(block / g.blocks, block % g.blocks, y, y_end);
      row += y_end - y;
    }
  });
}

}  // namespace

bool in_forked_child() { return forked; }

void* scratch_for_packing(int64_t bytes) { return packing_buffer.get(bytes); }

void infer(const Kernels& k, const Geometry& g, const WeightsView& w, Precision precision,
           const Input& x, const Output& out, int64_t batch, const ThreadPool& given) {
  ThreadPool pool = given;
  const int64_t work = batch * g.pixels() * g.C * (3 * g.C + 60);
  if (in_forked_child() || work < 100000) pool.threads = 1;
  const int64_t each = batch / pool.threads;  // images a thread computes alone
  if (each > 0) {
    parallel_for(pool, pool.threads, [&](int64_t thread) {
      // Small images are grouped: they share the passes over the weights.
      int64_t together = divide_up(392, g.pixels());
      together = together > 4 ? 4 : together;
      const int64_t groups = divide_up(each, together < each ? together : each);
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t begin = thread * each + i * each / groups;
        const int64_t end = thread * each + (i + 1) * each / groups;
        Group(k, g, w, precision, x, out, begin, end - begin).all_on_this_thread();
      }
    });
  }
  const int64_t rest = batch - each * pool.threads;
  if (rest > 0) by_phases(Group(k, g, w, precision, x, out, batch - rest, rest), pool);
  planes_buffer.release_if_over(KEEP_BYTES);
}

}  // namespace casvit
