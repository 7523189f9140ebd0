// What the training phases share: scratch, units of work, and partial sums that are merged in a
// fixed order, so that results do not depend on the number of threads.
#pragma once

#include <cstring>

#include "cpu/scratch.h"
#include "cpu/train.h"

namespace casvit {

// Scratch of the calling thread, for one call of a phase.
Buffer& call_buffer();
// Scratch of each thread, for one task.
void* task_scratch(int64_t bytes);
inline float* task_floats(int64_t floats) { return static_cast<float*>(task_scratch(floats * 4)); }

// Takes arrays for one call out of a buffer.
class Arrays {
 public:
  explicit Arrays(int64_t bytes, Buffer& buffer = call_buffer())
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

// Rows of C floats to rows padded with zeros to whole blocks, and back.
inline void pad(const Geometry& g, int64_t rows, const float* from, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += g.C, to += g.padded()) {
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(g.C));
    std::memset(to + g.C, 0, sizeof(float) * static_cast<size_t>(g.padded() - g.C));
  }
}
inline void unpad(const Geometry& g, int64_t rows, const float* from, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += g.padded(), to += g.C)
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(g.C));
}

inline int64_t channels_of(const Geometry& g, int64_t block) {
  const int64_t left = g.C - block * g.lanes;
  return left < g.lanes ? left : g.lanes;
}

// f(image, block, band, y_begin, y_end) for unit i, for all units, or for those of one image.
template <class F>
void for_band(const Geometry& g, const Bands& bands, int64_t i, const F& f) {
  const int64_t band = i % bands.count, unit = i / bands.count;
  const int64_t y_begin = band * bands.rows, y_end = y_begin + bands.rows;
  f(unit / g.blocks, unit % g.blocks, band, y_begin, y_end < g.H ? y_end : g.H);
}
template <class F>
void for_bands(const TrainingProblem& p, const Bands& bands, const F& f) {
  const Geometry& g = p.geometry;
  parallel_for(p.pool, p.images * g.blocks * bands.count,
               [&](int64_t i) { for_band(g, bands, i, f); });
}
template <class F>
void for_bands_of(const TrainingProblem& p, const Bands& bands, int64_t image, const F& f) {
  const int64_t each = p.geometry.blocks * bands.count;
  for (int64_t i = 0; i < each; ++i) for_band(p.geometry, bands, image * each + i, f);
}

// Partial sums of units: [images][bands][blocks][K][lanes].
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

}  // namespace casvit
