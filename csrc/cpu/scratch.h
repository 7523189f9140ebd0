// Scratch memory, kept between calls.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/huge_pages.h"
#include "cpu/kernels.h"

namespace casvit {

// A growing allocation, page-aligned, in huge pages where it is large; declare it thread_local.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  void* get(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      const int64_t page = bytes < HUGE_FROM ? 4096 : HUGE_PAGE;
      const size_t rounded = static_cast<size_t>((bytes + page - 1) / page * page);
      data_ = std::aligned_alloc(static_cast<size_t>(page), rounded);
      if (!data_) throw std::bad_alloc();
      wish_huge_pages(data_, static_cast<int64_t>(rounded));
      capacity_ = static_cast<int64_t>(rounded);
      std::memset(&shape_, 0, sizeof shape_);
    }
    return data_;
  }
  // Planes for `images` images, with a zero halo. Kernels write interiors only, so the halo that an
  // earlier call of the same shape zeroed still is.
  float* planes(const Geometry& g, int64_t images, int64_t image_floats) {
    float* p = static_cast<float*>(get(images * image_floats * 4));
    const Shape shape{g.C, g.H, g.W, g.lanes};
    if (std::memcmp(&shape, &shape_, sizeof shape) != 0 || images > zeroed_) {
      std::memset(p, 0, static_cast<size_t>(images * image_floats * 4));
      shape_ = shape;
      zeroed_ = images;
    }
    return p;
  }
  void release_if_over(int64_t bytes) {
    if (capacity_ <= bytes) return;
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    std::memset(&shape_, 0, sizeof shape_);
  }

 private:
  struct Shape {
    int64_t C, H, W, lanes;
  };
  void* data_ = nullptr;
  int64_t capacity_ = 0;
  Shape shape_{};
  int64_t zeroed_ = 0;
};

}  // namespace casvit
