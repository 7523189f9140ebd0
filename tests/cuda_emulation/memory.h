// Global memory: the buffers that a launch may touch, and what it moved.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace casvit::cuda::emulation {

class Memory {
 public:
  struct Buffer {
    std::string name;
    uintptr_t begin;
    size_t bytes;
    bool writable;
    uint64_t read = 0, written = 0;  // bytes, each time they are asked for
    bool read_as_constant = false, stored = false;
  };

  void add(const std::string& name, const void* pointer, size_t bytes, bool writable) {
    buffers_.push_back({name, reinterpret_cast<uintptr_t>(pointer), bytes, writable});
  }

  // The counts go on; what was written by an earlier launch is constant in this one.
  void begin_launch() {
    for (Buffer& b : buffers_) b.read_as_constant = b.stored = false;
  }

  // Each throws std::runtime_error with what is wrong.
  void load(const void* p, size_t bytes) { find(p, bytes).read += bytes; }
  void load_constant(const void* p, size_t bytes) {
    Buffer& buffer = find(p, bytes);
    buffer.read += bytes;
    buffer.read_as_constant = true;
    if (buffer.stored)
      throw std::runtime_error("load_constant from " + buffer.name + ", which this launch writes");
  }
  void store(const void* p, size_t bytes) {
    Buffer& buffer = find(p, bytes);
    if (!buffer.writable)
      throw std::runtime_error("a store to " + buffer.name + ", which is for reading");
    buffer.written += bytes;
    buffer.stored = true;
    if (buffer.read_as_constant)
      throw std::runtime_error("a store to " + buffer.name +
                               ", which this launch reads by load_constant");
  }

  static void check_alignment(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes)
      throw std::runtime_error("a global address that is no multiple of " + std::to_string(bytes));
  }

  const std::vector<Buffer>& buffers() const { return buffers_; }

 private:
  Buffer& find(const void* p, size_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    const auto holds = [&](const Buffer& b) {
      return address >= b.begin && address - b.begin < b.bytes &&
             b.bytes - (address - b.begin) >= bytes;
    };
    check_alignment(p, bytes);
    if (last_ < buffers_.size() && holds(buffers_[last_])) return buffers_[last_];
    for (last_ = 0; last_ < buffers_.size(); last_++)
      if (holds(buffers_[last_])) return buffers_[last_];
    throw std::runtime_error(std::to_string(bytes) + " bytes of global memory in no buffer" +
                             nearest(address));
  }

  std::string nearest(uintptr_t address) const {
    const Buffer* best = nullptr;
    uintptr_t distance = 0;
    for (const Buffer& b : buffers_) {
      const uintptr_t d = address < b.begin ? b.begin - address : address - b.begin;
      if (!best || d < distance) best = &b, distance = d;
    }
    if (!best) return "";
    const auto offset = static_cast<int64_t>(address - best->begin);
    return ": byte " + std::to_string(offset) + " of " + best->name + ", which has " +
           std::to_string(best->bytes);
  }

  std::vector<Buffer> buffers_;
  size_t last_ = 0;
};

}  // namespace casvit::cuda::emulation
