#include "cpu/train_qkv.h"

#include <cstring>

#include "cpu/k_scale.h"
#include "cpu/train_units.h"

namespace casvit {
namespace {

thread_local Buffer qkv_buffer;
constexpr int64_t BIAS_PIXELS = 1024;

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

}  // namespace

void project(const TrainingProblem& p, const WeightsView& w, Precision precision, const Input& x,
             float* qkv) {
  const Geometry& g = p.geometry;
  parallel_for(p.pool, p.images * 3 * g.blocks,
               [&](int64_t i) { clear_borders(g, qkv + i * g.plane); });
  // Pixels are shared out, and channel blocks too where there are few pixels.
  const int64_t pixels = p.images * g.pixels(), threads = p.pool.threads;
  const int64_t most = pixels < 64 ? 1 : pixels / 64;
  const int64_t part = divide_up(divide_up(pixels, most < threads ? most : threads), 16) * 16;
  const int64_t parts = divide_up(pixels, part);
  const int64_t block_part = divide_up(divide_up(3 * g.blocks, divide_up(threads, parts)), 2) * 2;
  const int64_t block_parts = divide_up(3 * g.blocks, block_part);
  parallel_for(p.pool, parts * block_parts, [&](int64_t i) {
    const int64_t begin = i / block_parts * part, block = i % block_parts * block_part;
    const int64_t end = begin + part < pixels ? begin + part : pixels;
    const int64_t block_end = block + block_part < 3 * g.blocks ? block + block_part : 3 * g.blocks;
    const PixelRun pixel_run{&x, &g, 0, begin, end};
    void* temp = task_scratch(p.kernels.qkv.temp_bytes(g.C, precision, end - begin));
    p.kernels.qkv.gemm(pixel_run, w, precision, block, block_end, qkv, p.image_floats(), temp);
  });
}

QkvBackward::QkvBackward(const TrainingProblem& p, const float* grad, const QkvGradients& to,
                         bool by_images)
    : p_(p), grad_(grad), to_(to), by_images_(by_images) {
  const Geometry& g = p.geometry;
  // The gradient of the weights is summed in parts of the pixels: images, or cut by the shape
  // alone.
  int64_t parts = pixels() / 4096 < 1 ? 1 : pixels() / 4096 > 8 ? 8 : pixels() / 4096;
  part_ = by_images ? g.pixels() : divide_up(pixels(), parts);
  parts_ = divide_up(pixels(), part_);
  const int64_t square = 3 * g.C * g.C, summed = parts_ > 1 && to.grad_weight ? parts_ : 0;
  const int64_t packed_bytes =
      to.grad_x ? p.kernels.qkv_backward.input_weight_bytes(g.C, to.precision) : 0;
  const int64_t scales = padded_k_scales(rows());
  units_of_image_ = divide_up(g.pixels(), BIAS_PIXELS);
  const int64_t bias_sums = to.grad_bias ? p.images * units_of_image_ * rows() : 0;
  Arrays arrays(Arrays::bytes<float>(to.grad_x ? square : 0) + Arrays::bytes<char>(packed_bytes) +
                    Arrays::bytes<float>(scales) + Arrays::bytes<float>(summed * square) +
                    Arrays::bytes<double>(bias_sums),
                qkv_buffer);
  k_scale_ = arrays.take<float>(scales);
  packed_ = arrays.take<char>(packed_bytes);
  float* scratch = arrays.take<float>(to.grad_x ? square : 0);
  sums_ = parts_ > 1 ? arrays.take<float>(summed * square) : to.grad_weight;
  bias_sums_ = arrays.take<double>(bias_sums);
  if (!to.grad_x) return;
  const float* matrix = matrix_ = dense_matrix(*to.weight, 3 * g.C, g.C, scratch);
  if (p.kernels.qkv.scales_k) {
    for (int64_t k = rows(); k < scales; ++k) k_scale_[k] = 1.0f;
    const int64_t share = divide_up(rows(), p.pool.threads);
    parallel_for(p.pool, p.pool.threads, [&](int64_t i) {
      const int64_t end = (i + 1) * share < rows() ? (i + 1) * share : rows();
      row_maxima(matrix, g.C, i * share, end, k_scale_);
    });
  }
  parallel_for(p.pool, g.blocks, [&](int64_t column) {
    p.kernels.qkv_backward.input_pack_weights(matrix, g.C, to.precision, column, k_scale_, packed_);
  });
}

QkvBackward::~QkvBackward() { qkv_buffer.release_if_over(int64_t{256} << 20); }

bool QkvBackward::goes_by_images(const TrainingProblem& p) {
  const Geometry& g = p.geometry;
  const int64_t threads = p.pool.threads;
  const bool balanced = p.images % threads == 0 || p.images >= 4 * threads;
  // Partial sums of the weight gradient, 3 C * C for each image, must stay small beside the image.
  return balanced && p.images > 1 && g.pixels() >= 4 * g.C;
}
void QkvBackward::image(int64_t i) const {
  input(i * part_, (i + 1) * part_);
  weight(i, 0, rows());
  for (int64_t unit = 0; unit < units_of_image_; ++unit) bias(i * units_of_image_ + unit);
}
// What `image` leaves to do when all are done, or everything.
void QkvBackward::finish() const {
  if (!by_images_) {
    const int64_t share = divide_up(divide_up(pixels(), p_.pool.threads), 16) * 16;
    parallel_for(p_.pool, divide_up(pixels(), share), [&](int64_t i) {
      input(i * share, (i + 1) * share < pixels() ? (i + 1) * share : pixels());
    });
    const int64_t band = divide_up(divide_up(rows(), divide_up(p_.pool.threads, parts_)), 32) * 32;
    const int64_t bands = divide_up(rows(), band);
    parallel_for(p_.pool, parts_ * bands, [&](int64_t i) {
      const int64_t row = i % bands * band;
      weight(i / bands, row, row + band < rows() ? row + band : rows());
    });
    if (to_.grad_bias)
      parallel_for(p_.pool, p_.images * units_of_image_, [&](int64_t unit) { bias(unit); });
  }
  for (int64_t row = 0; row < rows() && to_.grad_bias; ++row) {
    double sum = 0.0;
    for (int64_t unit = 0; unit < p_.images * units_of_image_; ++unit)
      sum += bias_sums_[unit * rows() + row];
    to_.grad_bias[row] = static_cast<float>(sum);
  }
  if (parts_ == 1 || !to_.grad_weight) return;
  const int64_t size = rows() * p_.geometry.C, threads = p_.pool.threads;
  parallel_for(p_.pool, threads, [&](int64_t i) {
    for (int64_t j = i * size / threads; j < (i + 1) * size / threads; ++j) {
      float sum = sums_[j];
      for (int64_t n = 1; n < parts_; ++n) sum += sums_[n * size + j];
      to_.grad_weight[j] = sum;
    }
  });
}

void QkvBackward::input(int64_t begin, int64_t end) const {
  if (!to_.grad_x) return;
  const int64_t C = p_.geometry.C;
  p_.kernels.qkv_backward.input(
      p_.geometry, grad_, packed_, k_scale_, matrix_, to_.precision, begin, end, *to_.grad_x,
      task_scratch(p_.kernels.qkv_backward.input_temp_bytes(C, to_.precision)));
}
void QkvBackward::weight(int64_t part, int64_t row, int64_t row_end) const {
  if (!to_.grad_weight) return;
  const int64_t C = p_.geometry.C, begin = part * part_, end = begin + part_;
  const int64_t bytes =
      p_.kernels.qkv_backward.weight_temp_bytes(C, divide_up(row_end - row, 16), to_.precision);
  p_.kernels.qkv_backward.weight(p_.geometry, grad_, *to_.x, to_.precision, begin,
                                 end < pixels() ? end : pixels(), row, row_end,
                                 sums_ + part * rows() * C, task_scratch(bytes));
}

// Sums the columns of grad over one unit: up to 16 pixels in float, these in double.
void QkvBackward::bias(int64_t unit) const {
  if (!to_.grad_bias) return;
  const int64_t pixels = p_.geometry.pixels(), columns = rows();
  const int64_t first = unit % units_of_image_ * BIAS_PIXELS;
  const int64_t count = pixels - first < BIAS_PIXELS ? pixels - first : BIAS_PIXELS;
  const float* grad = grad_ + (unit / units_of_image_ * pixels + first) * columns;
  double* to = bias_sums_ + unit * columns;
  for (int64_t c = 0; c < columns; ++c) to[c] = 0.0;
  for (int64_t pixel = 0; pixel < count; pixel += 16) {
    const int64_t some = count - pixel < 16 ? count - pixel : 16;
    for (int64_t begin = 0; begin < columns; begin += 64) {
      const int64_t width = columns - begin < 64 ? columns - begin : 64;
      float sum[64] = {};
      for (int64_t i = 0; i < some; ++i) {
        const float* row = grad + (pixel + i) * columns + begin;
        for (int64_t c = 0; c < width; ++c) sum[c] += row[c];
      }
      for (int64_t c = 0; c < width; ++c) to[begin + c] += static_cast<double>(sum[c]);
    }
  }
}

void qkv_backward(const TrainingProblem& p, const float* grad_qkv, const QkvGradients& to) {
  QkvBackward(p, grad_qkv, to, false).finish();
}

}  // namespace casvit
