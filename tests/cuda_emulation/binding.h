// For binding kernels to Python: arrays as buffers of a launch.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "emulation.h"

namespace casvit::cuda::emulation {

// The array's data, which the launch may touch from now on. V tells its element type, as does the
// array.
template <class V>
V* buffer(Memory& memory, const std::string& name, const pybind11::array& array, bool writable) {
  if (!array.dtype().is(pybind11::dtype::of<V>()) || !(array.flags() & pybind11::array::c_style))
    throw std::invalid_argument(name + ": another element type, or not contiguous");
  V* data = static_cast<V*>(const_cast<void*>(array.data()));
  memory.add(name, data, array.nbytes(), writable);
  return data;
}
template <class V>
const V* input(Memory& memory, const std::string& name, const pybind11::array& array) {
  return buffer<V>(memory, name, array, false);
}
template <class V>
V* output(Memory& memory, const std::string& name, const pybind11::array& array) {
  return buffer<V>(memory, name, array, true);
}

}  // namespace casvit::cuda::emulation
