#include "cpu/train.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"

namespace casvit {
namespace {

// Of the calling thread and of each task.
thread_local Buffer call_buffer, product_buffer, task_buffer;

// Takes arrays for one call out of one of the calling thread's buffers.
class Arrays {
 public:
  explicit Arrays(int64_t bytes, Buffer& buffer = call_buffer)
      : next_(static_cast<char*>(buffer.get(bytes))) {}
  template <class T>
  T* take(int64_t count) {
    T* begin = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return begin;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return divide_up(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
  }

 private:
  char* next_;
};

float* temp_floats(int64_t floats) { return static_cast<float*>(task_buffer.get(floats * 4)); }

// Rows of C floats to rows padded with zeros to whole blocks, and back.
void pad(const Geometry& g, int64_t rows, const float* from, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += g.C, to += g.padded()) {
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(g.C));
    std::memset(to + g.C, 0, sizeof(float) * static_cast<size_t>(g.padded() - g.C));
  }
}
void unpad(const Geometry& g, int64_t rows, const float* from, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += g.padded(), to += g.C)
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(g.C));
}

int64_t channels_of(const Geometry& g, int64_t block) {
  const int64_t left = g.C - block * g.lanes;
  return left < g.lanes ? left : g.lanes;
}

// Calls f(image, block, band, y_begin, y_end) for every unit of work, or for those of one image.
template <class F>
void for_band(const Geometry& g, const Bands& bands, int64_t i, const F& f) {
  const int64_t band = i % bands.count, unit = i / bands.count;
  const int64_t y_begin = band * bands.rows, y_end = y_begin + bands.rows;
  f(unit / g.blocks, unit % g.blocks, band, y_begin, y_end < g.H ? y_end : g.H);
}
template <class F>
void for_bands(const TrainingProblem& p, const Bands& bands, const F& f) {
  const Geometry& g = p.geometry;
  run(p.pool, p.images * g.blocks * bands.count, [&](int64_t i) { for_band(g, bands, i, f); });
}
template <class F>
void for_bands_of(const TrainingProblem& p, const Bands& bands, int64_t image, const F& f) {
  const int64_t each = p.geometry.blocks * bands.count;
  for (int64_t i = 0; i < each; ++i) for_band(p.geometry, bands, image * each + i, f);
}

// Partial sums of the units: [images][bands][blocks][K][lanes].
struct Partials {
  const Geometry& g;
  int64_t bands, count;  // count: sums of a unit
  double* data;

  static int64_t size(const TrainingProblem& p, const Bands& bands, int64_t count) {
    return p.images * bands.count * p.geometry.padded() * count;
  }
  double* at(int64_t image, int64_t band, int64_t block) const {
    return data + ((image * bands + band) * g.blocks + block) * count * g.lanes;
  }
  // to[lane * stride + i] = sum i of a block over images [first, last).
  void merge(int64_t first, int64_t last, int64_t block, int64_t begin, int64_t sums, float* to,
             int64_t stride) const {
    double total[9 * 16] = {};  // at most 9 sums of at most 16 lanes
    for (int64_t image = first; image < last; ++image)
      for (int64_t band = 0; band < bands; ++band) {
        const double* from = at(image, band, block) + begin * g.lanes;
        for (int64_t j = 0; j < sums * g.lanes; ++j) total[j] += from[j];
      }
    for (int64_t c = 0; c < channels_of(g, block); ++c)
      for (int64_t i = 0; i < sums; ++i)
        to[c * stride + i] = static_cast<float>(total[i * g.lanes + c]);
  }
};

void clear_borders(const Geometry& g, float* plane) {
  const size_t row = sizeof(float) * static_cast<size_t>(g.row);
  const size_t pixel = sizeof(float) * static_cast<size_t>(g.lanes);
  std::memset(plane, 0, row);
  for (int64_t y = 1; y <= g.H; ++y) {
    std::memset(plane + y * g.row, 0, pixel);
    std::memset(plane + (y + 1) * g.row - g.lanes, 0, pixel);
  }
  std::memset(plane + (g.H + 1) * g.row, 0, row);
}

// The forward pass from q, k, v on.
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
    k.spatial_gate(g, w.gate[which], qkv + (image * 3 + which) * g.blocks * g.plane, strip,
                   spatial + map * g.pixels(), sums + (map * strips.count + strip) * g.padded(),
                   temp_floats(spatial_gate_temp_floats(g)));
  }
  void pool(int64_t first, int64_t last) const {
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
              y_begin, y_end, out, image, temp_floats(combine_temp_floats(g)));
  }

  // Images [first, last) on this thread, while their q, k and v are in its cache.
  void whole(int64_t first, int64_t last) const {
    for (int64_t image = first; image < last; ++image)
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t strip = 0; strip < strips.count; ++strip) spatial_gate(image, which, strip);
    pool(first, last);
    for (int64_t which = 0; which < 2; ++which) channel_gate(which, first, last, 0, g.blocks);
    for (int64_t image = first; image < last; ++image)
      for (int64_t block = 0; block < g.blocks; ++block) combine(image, block, 0, g.H);
  }
  // Images [first, last), each phase on all threads.
  void by_phases(int64_t first, int64_t last) const {
    run(p.pool, (last - first) * 2 * strips.count, [&](int64_t i) {
      spatial_gate(first + i / (2 * strips.count), i / strips.count % 2, i % strips.count);
    });
    pool(first, last);
    run(p.pool, 2 * g.blocks, [&](int64_t i) {
      channel_gate(i / g.blocks, first, last, i % g.blocks, i % g.blocks + 1);
    });
    const Bands bands = make_bands(g, last - first);
    run(p.pool, (last - first) * g.blocks * bands.count, [&](int64_t i) {
      const int64_t unit = i / bands.count, y = i % bands.count * bands.rows;
      combine(first + unit / g.blocks, unit % g.blocks, y,
              y + bands.rows < g.H ? y + bands.rows : g.H);
    });
  }
};

// The gradients of the product; see ProductGradients.
class ProductBackward {
 public:
  ProductBackward(const TrainingProblem& p, const float* grad, const ProductGradients& to,
                  bool by_images)
      : p_(p), grad_(grad), to_(to), by_images_(by_images) {
    const Geometry& g = p.geometry;
    // Sums over parts of the pixels: images, or cut by the shape alone.
    int64_t parts = pixels() / 4096 < 1 ? 1 : pixels() / 4096 > 8 ? 8 : pixels() / 4096;
    part_ = by_images ? g.pixels() : divide_up(pixels(), parts);
    parts_ = divide_up(pixels(), part_);
    const int64_t square = 3 * g.C * g.C, summed = parts_ > 1 && to.grad_weight ? parts_ : 0;
    const int64_t packed_bytes =
        to.grad_x ? p.kernels.input_gradient_weight_bytes(g.C, to.kind) : 0;
    const int64_t terms = padded_balance(rows());
    Arrays arrays(Arrays::bytes<float>(to.grad_x ? square : 0) + Arrays::bytes<char>(packed_bytes) +
                      Arrays::bytes<float>(terms) + Arrays::bytes<float>(summed * square),
                  product_buffer);
    balance_ = arrays.take<float>(terms);
    packed_ = arrays.take<char>(packed_bytes);
    float* scratch = arrays.take<float>(to.grad_x ? square : 0);
    sums_ = parts_ > 1 ? arrays.take<float>(summed * square) : to.grad_weight;
    if (!to.grad_x) return;
    const float* matrix = matrix_ = dense_matrix(*to.weight, 3 * g.C, g.C, scratch);
    if (p.kernels.balanced) {
      for (int64_t term = rows(); term < terms; ++term) balance_[term] = 1.0f;
      const int64_t share = divide_up(rows(), p.pool.threads);
      run(p.pool, p.pool.threads, [&](int64_t i) {
        const int64_t end = (i + 1) * share < rows() ? (i + 1) * share : rows();
        balance_rows(matrix, g.C, i * share, end, balance_);
      });
    }
    run(p.pool, g.blocks, [&](int64_t column) {
      p.kernels.input_gradient_pack_weights(matrix, g.C, to.kind, column, balance_, packed_);
    });
  }

  ~ProductBackward() { product_buffer.release_if_over(int64_t{256} << 20); }

  static bool goes_by_images(const TrainingProblem& p) {
    const Geometry& g = p.geometry;
    const int64_t threads = p.pool.threads;
    const bool balanced = p.images % threads == 0 || p.images >= 4 * threads;
    return balanced && p.images > 1 && g.pixels() >= 4 * g.C;  // so that parts are small
  }
  void image(int64_t i) const {
    input(i * part_, (i + 1) * part_);
    weight(i, 0, rows());
  }
  // What `image` leaves to do when all are done, or everything.
  void finish() const {
    if (!by_images_) {
      const int64_t share = divide_up(divide_up(pixels(), p_.pool.threads), 16) * 16;
      run(p_.pool, divide_up(pixels(), share), [&](int64_t i) {
        input(i * share, (i + 1) * share < pixels() ? (i + 1) * share : pixels());
      });
      const int64_t band =
          divide_up(divide_up(rows(), divide_up(p_.pool.threads, parts_)), 32) * 32;
      const int64_t bands = divide_up(rows(), band);
      run(p_.pool, parts_ * bands, [&](int64_t i) {
        const int64_t row = i % bands * band;
        weight(i / bands, row, row + band < rows() ? row + band : rows());
      });
    }
    if (parts_ == 1 || !to_.grad_weight) return;
    const int64_t size = rows() * p_.geometry.C, threads = p_.pool.threads;
    run(p_.pool, threads, [&](int64_t i) {
      for (int64_t j = i * size / threads; j < (i + 1) * size / threads; ++j) {
        float sum = sums_[j];
        for (int64_t n = 1; n < parts_; ++n) sum += sums_[n * size + j];
        to_.grad_weight[j] = sum;
      }
    });
  }

 private:
  int64_t pixels() const { return p_.images * p_.geometry.pixels(); }
  int64_t rows() const { return 3 * p_.geometry.C; }
  void input(int64_t begin, int64_t end) const {
    if (!to_.grad_x) return;
    const int64_t C = p_.geometry.C;
    p_.kernels.input_gradient(p_.geometry, grad_, packed_, balance_, matrix_, to_.kind, begin, end,
                              *to_.grad_x,
                              task_buffer.get(p_.kernels.input_gradient_temp_bytes(C, to_.kind)));
  }
  void weight(int64_t part, int64_t row, int64_t row_end) const {
    if (!to_.grad_weight) return;
    const int64_t C = p_.geometry.C, begin = part * part_, end = begin + part_;
    const int64_t bytes =
        p_.kernels.weight_gradient_temp_bytes(C, divide_up(row_end - row, 16), to_.kind);
    p_.kernels.weight_gradient(p_.geometry, grad_, *to_.x, to_.kind, begin,
                               end < pixels() ? end : pixels(), row, row_end,
                               sums_ + part * rows() * C, task_buffer.get(bytes));
  }

  const TrainingProblem& p_;
  const float* grad_;
  const ProductGradients& to_;
  const bool by_images_;
  int64_t part_, parts_;           // pixels of one, number
  const float* matrix_ = nullptr;  // the weights
  char* packed_;
  float* balance_;  // [3C, padded], where kernels are balanced
  float* sums_;     // [parts][3C][C]
};

}  // namespace

TrainingProblem::TrainingProblem(const Kernels& k, int64_t images, int64_t C, int64_t H, int64_t W,
                                 const Pool& pool)
    : kernels(k), geometry(make_geometry(C, H, W, k.lanes)), images(images), pool(pool) {
  if (in_forked_child() || images * C * H * W < 4096) this->pool.threads = 1;
}

void project(const TrainingProblem& p, const WeightsView& w, Product kind, const Input& x,
             float* qkv) {
  const Geometry& g = p.geometry;
  run(p.pool, p.images * 3 * g.blocks, [&](int64_t i) { clear_borders(g, qkv + i * g.plane); });
  // Pieces of the pixels, and of the blocks where there are few pixels.
  const int64_t pixels = p.images * g.pixels(), threads = p.pool.threads;
  const int64_t most = pixels < 64 ? 1 : pixels / 64;
  const int64_t part = divide_up(divide_up(pixels, most < threads ? most : threads), 16) * 16;
  const int64_t parts = divide_up(pixels, part);
  const int64_t block_part = divide_up(divide_up(3 * g.blocks, divide_up(threads, parts)), 2) * 2;
  const int64_t block_parts = divide_up(3 * g.blocks, block_part);
  run(p.pool, parts * block_parts, [&](int64_t i) {
    const int64_t begin = i / block_parts * part, block = i % block_parts * block_part;
    const int64_t end = begin + part < pixels ? begin + part : pixels;
    const int64_t block_end = block + block_part < 3 * g.blocks ? block + block_part : 3 * g.blocks;
    const PixelRun pixel_run{&x, &g, 0, begin, end};
    void* temp = task_buffer.get(p.kernels.product_temp_bytes(g.C, kind, end - begin));
    p.kernels.product(pixel_run, w, kind, block, block_end, qkv, p.image_floats(), temp);
  });
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
  // Merged as Chan, Golub and LeVeque do: counts, means and squared deviations.
  run(p.pool, 2 * g.blocks, [&](int64_t i) {
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
  // Small images share the passes over the channel gates' weights.
  int64_t together = divide_up(392, g.pixels());
  together = together > 4 ? 4 : together;
  const int64_t whole = p.images / (together * p.pool.threads) * p.pool.threads;
  if (whole > 0)
    run(p.pool, whole, [&](int64_t i) { mixing.whole(i * together, (i + 1) * together); });
  if (whole * together < p.images) mixing.by_phases(whole * together, p.images);
  unpad(g, 2 * p.images, pooled_data, pooled);
  unpad(g, 2 * p.images, gates, channel);
}

void backward_combine(const TrainingProblem& p, const WeightsView& w, const Input& grad,
                      const float* qkv, const float* spatial, const float* channel,
                      const CombineGradients& to) {
  const Geometry& g = p.geometry;
  const Bands bands = make_bands(g, p.images);
  const int64_t sums = Partials::size(p, bands, COMBINE_SUMS);
  const int64_t maps = p.images * g.blocks * 2 * g.pixels(), vectors = 2 * p.images * g.padded();
  Arrays arrays(Arrays::bytes<double>(sums) + Arrays::bytes<float>(maps) +
                Arrays::bytes<float>(vectors));
  const Partials partials{g, bands.count, COMBINE_SUMS, arrays.take<double>(sums)};
  float* pixel = arrays.take<float>(maps);
  float* gates = arrays.take<float>(vectors);
  pad(g, 2 * p.images, channel, gates);
  const BackwardCombine io{&grad, qkv, spatial, gates, p.images, to.grad_qkv, to.grad_sum, pixel};
  for_bands(p, bands,
            [&](int64_t image, int64_t block, int64_t band, int64_t y_begin, int64_t y_end) {
              p.kernels.backward_combine(g, w, io, image, block, y_begin, y_end,
                                         partials.at(image, band, block),
                                         temp_floats(backward_combine_temp_floats(g, bands)));
            });
  const int64_t map = 2 * g.pixels();
  run(p.pool, p.images, [&](int64_t image) {
    const float* from = pixel + image * g.blocks * map;
    for (int64_t first = 0; first < map; first += 64) {
      const int64_t count = map - first < 64 ? map - first : 64;
      double sum[64] = {};
      for (int64_t block = 0; block < g.blocks; ++block)
        for (int64_t i = 0; i < count; ++i)
          sum[i] += static_cast<double>(from[block * map + first + i]);
      for (int64_t i = 0; i < count; ++i)
        to.pixel[image * map + first + i] = static_cast<float>(sum[i]);
    }
  });
  run(p.pool, g.blocks, [&](int64_t block) {
    const int64_t c = block * g.lanes;
    partials.merge(0, p.images, block, DWC, 9, to.dwc_weight + c * 9, 9);
    partials.merge(0, p.images, block, PROJ, 9, to.proj_weight + c * 9, 9);
    partials.merge(0, p.images, block, DWC_BIAS, 1, to.dwc_bias + c, 1);
    partials.merge(0, p.images, block, PROJ_BIAS, 1, to.proj_bias + c, 1);
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t image = 0; image < p.images; ++image)
        partials.merge(image, image + 1, block, CHANNEL_SUM + i, 1,
                       to.channel + (i * p.images + image) * g.C + c, 1);
  });
}

void backward_channel_gate(const TrainingProblem& p, const Sources& s, const float* sum,
                           const float* pooled, const float* channel, float* shift,
                           float* const (&grad_weight)[2]) {
  const Geometry& g = p.geometry;
  const int64_t rows = 2 * p.images, vectors = rows * g.padded(), square = g.C * g.C;
  Arrays arrays(3 * Arrays::bytes<float>(vectors) + 2 * Arrays::bytes<float>(square));
  float *grads = arrays.take<float>(vectors), *means = arrays.take<float>(vectors);
  float* shifts = arrays.take<float>(vectors);
  const float* weights[2];
  for (int i = 0; i < 2; ++i)
    weights[i] = dense_matrix(s.gate[i].channel_weight, g.C, g.C, arrays.take<float>(square));
  pad(g, rows, sum, grads);
  pad(g, rows, pooled, means);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < g.C; ++c) {
      const float gate = channel[r * g.C + c];
      grads[r * g.padded() + c] *= gate * (1.0f - gate);
    }
  const float scale = 1.0f / static_cast<float>(g.pixels());
  run(p.pool, 2 * g.blocks, [&](int64_t i) {
    const int64_t which = i / g.blocks, at = which * p.images * g.padded();
    p.kernels.channel_gate_backward(g, grads + at, means + at, weights[which], scale, p.images,
                                    i % g.blocks, shifts + at, grad_weight[which]);
  });
  unpad(g, rows, shifts, shift);
}

void coefficients(const TrainingProblem& p, const Sources& s, const float* sums,
                  const bool (&batch)[2], float* to) {
  const int64_t C = s.C;
  const double number = static_cast<double>(p.images * p.geometry.pixels());
  for (int i = 0; i < 2; ++i, to += 3 * C, sums += 2 * C)
    for (int64_t c = 0; c < C; ++c) {
      const double scale = normalizer(s.gate[i], c), each = -scale / number;
      to[c] = static_cast<float>(scale);
      // Not 0 times the sums of a frozen one: a NaN of one image would reach the others.
      to[C + c] = batch[i] ? static_cast<float>(static_cast<double>(sums[c]) * each) : 0.0f;
      to[2 * C + c] = batch[i] ? static_cast<float>(static_cast<double>(sums[C + c]) * each) : 0.0f;
    }
}

void backward_gate(const TrainingProblem& p, const TrainingGates& w, const float* qkv,
                   const float* spatial, const float* pixel, const float* shift,
                   const GateGradients& to) {
  const Geometry& g = p.geometry;
  const Strips strips = make_strips(g);
  const int64_t units = p.images * 2 * strips.count, each = GATE_SUMS * g.padded();
  const int64_t vectors = 2 * p.images * g.padded();
  Arrays arrays(Arrays::bytes<float>(units * each) + Arrays::bytes<float>(vectors));
  float* sums = arrays.take<float>(units * each);  // [images][2][strips][GATE_SUMS][padded]
  float* shifts = arrays.take<float>(vectors);
  pad(g, 2 * p.images, shift, shifts);
  run(p.pool, units, [&](int64_t i) {
    const int64_t strip = i % strips.count, map = i / strips.count;
    const int64_t image = map / 2, which = map % 2;
    p.kernels.backward_gate(g, w.gate[which], qkv + (image * 3 + which) * g.blocks * g.plane,
                            spatial + map * g.pixels(), pixel + map * g.pixels(),
                            shifts + (which * p.images + image) * g.padded(), strip,
                            to.logit + map * g.pixels(), sums + i * each,
                            temp_floats(backward_gate_temp_floats(g)));
  });
  run(p.pool, 2 * g.blocks, [&](int64_t i) {
    const int64_t which = i / g.blocks, block = i % g.blocks;
    double total[GATE_SUMS][16] = {};
    for (int64_t image = 0; image < p.images; ++image)
      for (int64_t strip = 0; strip < strips.count; ++strip) {
        const float* from =
            sums + ((image * 2 + which) * strips.count + strip) * each + block * g.lanes;
        for (int64_t s = 0; s < GATE_SUMS; ++s)
          for (int64_t c = 0; c < g.lanes; ++c)
            total[s][c] += static_cast<double>(from[s * g.padded() + c]);
      }
    for (int64_t c = 0; c < channels_of(g, block); ++c) {
      const int64_t channel = block * g.lanes + c;
      to.spatial_weight[which][channel] = static_cast<float>(total[SPATIAL_WEIGHT][c]);
      to.sums[which * 2 * g.C + channel] = static_cast<float>(total[GRAD_N][c]);
      to.sums[(which * 2 + 1) * g.C + channel] = static_cast<float>(total[GRAD_N_HAT][c]);
    }
  });
}

void product_backward(const TrainingProblem& p, const float* grad_qkv, const ProductGradients& to) {
  ProductBackward(p, grad_qkv, to, false).finish();
}

void backward_depthwise(const TrainingProblem& p, const TrainingGates& w, const float* qkv,
                        const float* spatial, const float* channel, const float* shift,
                        const float* logit, const float* coefficients, const float* grad_sum,
                        const DepthwiseGradients& to, const ProductGradients* product) {
  const Geometry& g = p.geometry;
  const Bands bands = make_bands(g, p.images);
  const int64_t sums = Partials::size(p, bands, 2 * DEPTHWISE_SUMS);
  const int64_t vectors = 2 * p.images * g.padded();
  Arrays arrays(Arrays::bytes<double>(sums) + 2 * Arrays::bytes<float>(vectors) +
                Arrays::bytes<float>(6 * g.padded()));
  const Partials partials{g, bands.count, 2 * DEPTHWISE_SUMS, arrays.take<double>(sums)};
  float* gates = arrays.take<float>(vectors);
  float* shifts = arrays.take<float>(vectors);
  float* factors = arrays.take<float>(6 * g.padded());
  pad(g, 2 * p.images, channel, gates);
  pad(g, 2 * p.images, shift, shifts);
  pad(g, 6, coefficients, factors);
  const BackwardDepthwise io{qkv,     spatial,  gates,    shifts,     logit,
                             factors, grad_sum, p.images, to.grad_qkv};
  auto unit = [&](int64_t image, int64_t block, int64_t band, int64_t y_begin, int64_t y_end) {
    double* to_sums = partials.at(image, band, block);
    for (int64_t i = 0; i < 2; ++i)
      p.kernels.backward_depthwise(g, w.gate[i], io, i, image, block, y_begin, y_end,
                                   to_sums + i * DEPTHWISE_SUMS * g.lanes,
                                   temp_floats(backward_depthwise_temp_floats(g)));
  };
  if (product && ProductBackward::goes_by_images(p)) {
    const ProductBackward products(p, to.grad_qkv, *product, true);
    run(p.pool, p.images, [&](int64_t image) {
      for_bands_of(p, bands, image, unit);
      products.image(image);
    });
    products.finish();
  } else {
    for_bands(p, bands, unit);
    if (product) product_backward(p, to.grad_qkv, *product);
  }
  run(p.pool, 2 * g.blocks, [&](int64_t i) {
    const int64_t which = i / g.blocks, block = i % g.blocks;
    const int64_t begin = which * DEPTHWISE_SUMS, c = block * g.lanes;
    partials.merge(0, p.images, block, begin + DEPTHWISE, 9, to.weight[which] + c * 9, 9);
    partials.merge(0, p.images, block, begin + DEPTHWISE_BIAS, 1, to.bias[which] + c, 1);
  });
}

}  // namespace casvit

// Plain C functions, called from Python through ctypes: how much memory a phase is to be given.
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
