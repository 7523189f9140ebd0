#include "cpu/train.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/train_units.h"

namespace casvit {
namespace {

// The forward pass from q, k and v to out.
struct Mixing {
  const TrainingProblem& p;
  const WeightsView& w;
  const float* qkv;
  const Output& out;
  float* spatial;
  float *sums, *pooled, *gates;  // [images][2][strips][padded], [2][images][padded] twice
  Strips strips;
  const Geometry& g = p.geometry;
  const Kernels& k = p.kernels;

  void spatial_gate(int64_t image, int64_t which, int64_t strip) const {
    const int64_t map = image * 2 + which;
    k.spatial_gate(g, w.gate[which], qkv + (image * 3 + which) * g.blocks * g.plane, strips, strip,
                   spatial + map * g.pixels(), sums + (map * strips.count + strip) * g.padded(),
                   task_floats(spatial_gate_temp_floats(g)));
  }
  void spatial_mean(int64_t first, int64_t last) const {
    const double scale = 1.0 / static_cast<double>(g.pixels());
    for (int64_t image = first; image < last; ++image)
      for (int64_t which = 0; which < 2; ++which) {
        float* to = pooled + (which * p.images + image) * g.padded();
        const float* from = sums + (image * 2 + which) * strips.count * g.padded();
        for (int64_t c = 0; c < g.padded(); ++c) {
          double sum = 0.0;
          for (int64_t s = 0; s < strips.count; ++s)
            sum += static_cast<double>(from[s * g.padded() + c]);
          to[c] = static_cast<float>(sum * scale);
        }
      }
  }
  void channel_gate(int64_t which, int64_t first, int64_t last, int64_t block_begin,
                    int64_t block_end) const {
    const int64_t offset = (which * p.images + first) * g.padded();
    k.channel_gate(g, w.gate[which], pooled + offset, gates + offset, last - first, block_begin,
                   block_end);
  }
  void combine(int64_t image, int64_t block, int64_t y_begin, int64_t y_end) const {
    const float* const gate[2] = {gates + image * g.padded(),
                                  gates + (p.images + image) * g.padded()};
    k.combine(g, w, qkv + image * p.image_floats(), spatial + image * 2 * g.pixels(), gate, block,
              y_begin, y_end, out, image, task_floats(combine_temp_floats(g)));
  }

  // Images [first, last) on this thread, while their q, k and v are in its cache.
  void whole(int64_t first, int64_t last) const {
    for (int64_t image = first; image < last; ++image)
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t strip = 0; strip < strips.count; ++strip) spatial_gate(image, which, strip);
    spatial_mean(first, last);
    for (int64_t which = 0; which < 2; ++which) channel_gate(which, first, last, 0, g.blocks);
    for (int64_t image = first; image < last; ++image)
      for (int64_t block = 0; block < g.blocks; ++block) combine(image, block, 0, g.H);
  }
  // Images [first, last), each phase on all threads.
  void by_phases(int64_t first, int64_t last) const {
    parallel_for(p.pool, (last - first) * 2 * strips.count, [&](int64_t i) {
      spatial_gate(first + i / (2 * strips.count), i / strips.count % 2, i % strips.count);
    });
    spatial_mean(first, last);
    parallel_for(p.pool, 2 * g.blocks, [&](int64_t i) {
      channel_gate(i / g.blocks, first, last, i % g.blocks, i % g.blocks + 1);
    });
    const Bands bands = make_bands(g, last - first);
    parallel_for(p.pool, (last - first) * g.blocks * bands.count, [&](int64_t i) {
      const int64_t unit = i / bands.count, y = i % bands.count * bands.rows;
      combine(first + unit / g.blocks, unit % g.blocks, y,
              y + bands.rows < g.H ? y + bands.rows : g.H);
    });
  }
};

}  // namespace

Buffer& call_buffer() {
  static thread_local Buffer buffer;
  return buffer;
}
void* task_scratch(int64_t bytes) {
  static thread_local Buffer buffer;
  return buffer.get(bytes);
}

TrainingProblem::TrainingProblem(const Kernels& k, int64_t images, int64_t C, int64_t H, int64_t W,
                                 const ThreadPool& pool)
    : kernels(k), geometry(make_geometry(C, H, W, k.lanes)), images(images), pool(pool) {
  if (in_forked_child() || images * C * H * W < 4096) this->pool.threads = 1;
}

void statistics(const TrainingProblem& p, const TrainingGates& w, const float* qkv,
                float* moments) {
  const Geometry& g = p.geometry;
  const Bands bands = make_bands(g, p.images);
  const int64_t size = Partials::size(p, bands, 4);
  const Partials partials{g, bands.count, 4,
                          Arrays(Arrays::bytes<double>(size)).take<double>(size)};
  for_bands(p, bands,
            [&](int64_t image, int64_t block, int64_t band, int64_t y_begin, int64_t y_end) {
              for (int64_t i = 0; i < 2; ++i)
                p.kernels.moments(g, w.gate[i].depthwise + block * 9 * g.lanes,
                                  qkv + ((image * 3 + i) * g.blocks + block) * g.plane, y_begin,
                                  y_end, partials.at(image, band, block) + i * 2 * g.lanes);
            });
  // Counts, means and squared deviations merged pairwise (Chan, Golub and LeVeque).
  parallel_for(p.pool, 2 * g.blocks, [&](int64_t i) {
    const int64_t which = i / g.blocks, block = i % g.blocks;
    double mean[16] = {}, square[16] = {}, count = 0.0;
    for (int64_t image = 0; image < p.images; ++image)
      for (int64_t band = 0; band < bands.count; ++band) {
        const double* from = partials.at(image, band, block) + which * 2 * g.lanes;
        const int64_t left = g.H - band * bands.rows;
        const double more = static_cast<double>((left < bands.rows ? left : bands.rows) * g.W);
        const double share = more / (count + more), between = count * share;
        for (int64_t c = 0; c < g.lanes; ++c) {
          const double difference = from[c] - mean[c];
          mean[c] += difference * share;
          square[c] += from[g.lanes + c] + difference * difference * between;
        }
        count += more;
      }
    const int64_t channel = block * g.lanes;
    const float* bias = w.gate[which].depthwise_bias + channel;
    float* to = moments + which * 2 * g.C + channel;
    for (int64_t c = 0; c < channels_of(g, block); ++c) {
      to[c] = static_cast<float>(mean[c] + static_cast<double>(bias[c]));
      to[g.C + c] = static_cast<float>(square[c] / count);
    }
  });
}

void mix(const TrainingProblem& p, const WeightsView& w, const float* qkv, const Output& out,
         float* spatial, float* pooled, float* channel) {
  const Geometry& g = p.geometry;
  const Strips strips = make_strips(g);
  const int64_t sums = p.images * 2 * strips.count * g.padded(),
                vectors = 2 * p.images * g.padded();
  Arrays arrays(Arrays::bytes<float>(sums) + 2 * Arrays::bytes<float>(vectors));
  float* sums_data = arrays.take<float>(sums);
  float* pooled_data = arrays.take<float>(vectors);
  float* gates = arrays.take<float>(vectors);
  const Mixing mixing{p, w, qkv, out, spatial, sums_data, pooled_data, gates, strips};
  // Small images are grouped: they share the passes over the weights of the channel gates.
  int64_t together = divide_up(392, g.pixels());
  together = together > 4 ? 4 : together;
  const int64_t whole = p.images / (together * p.pool.threads) * p.pool.threads;
  if (whole > 0)
    parallel_for(p.pool, whole, [&](int64_t i) { mixing.whole(i * together, (i + 1) * together); });
  if (whole * together < p.images) mixing.by_phases(whole * together, p.images);
  unpad(g, 2 * p.images, pooled_data, pooled);
  unpad(g, 2 * p.images, gates, channel);
}

}  // namespace casvit

// Plain C functions, called from Python through ctypes: the size of the arrays that a phase is
// given.
extern "C" {

__attribute__((visibility("default"))) int64_t casvit_cpu_qkv_floats(int64_t B, int64_t C,
                                                                     int64_t H, int64_t W) {
  return casvit::TrainingProblem(casvit::active_kernels(), B, C, H, W, {1, nullptr}).qkv_floats();
}
__attribute__((visibility("default"))) int64_t casvit_cpu_grad_sum_floats(int64_t B, int64_t C,
                                                                          int64_t H, int64_t W) {
  return casvit::TrainingProblem(casvit::active_kernels(), B, C, H, W, {1, nullptr})
      .grad_sum_floats();
}

}  // extern "C"
