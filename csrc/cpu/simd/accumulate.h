// Sums over many pixels: short chains in float, which are added up in double.
#pragma once

#include "cpu/simd/vec.h"

namespace casvit {
namespace CASVIT_ISA {

// Pixels in one chain of float additions.
constexpr int64_t SPAN = 56;

// K sums for each channel of a block: in float over about SPAN pixels, then in double.
template <int K>
class Accumulators {
 public:
  explicit Accumulators(double* total) : total_(total) {
    std::memset(total, 0, sizeof(double) * K * VL);
    std::memset(part_, 0, sizeof part_);
  }
  void add_to(int k, Vec v) { store(part_ + k * VL, add(load(part_ + k * VL), v)); }
  template <int N>
  void add_to(int k, const Vec (&v)[N]) {
    for (int i = 0; i < N; ++i) add_to(k + i, v[i]);
  }
  // The sums added since the last call were over so many pixels.
  void count(int64_t pixels) {
    pixels_ += pixels;
    if (pixels_ >= SPAN) flush();
  }
  void flush() {
    for (int i = 0; i < K * VL; ++i) total_[i] += static_cast<double>(part_[i]);
    std::memset(part_, 0, sizeof part_);
    pixels_ = 0;
  }

 private:
  double* total_;
  float part_[K * VL];
  int64_t pixels_ = 0;
};

}  // namespace CASVIT_ISA
}  // namespace casvit
