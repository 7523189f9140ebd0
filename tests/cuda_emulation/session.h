// Launches as csrc/cuda's own host code makes them: the stream of such a call is a Session.
#pragma once

#include <cxxabi.h>

#include <cstdlib>
#include <string>
#include <typeinfo>
#include <vector>

#include "machine.h"

#define CASVIT_PARAMETER const

namespace casvit::cuda {

namespace emulation {

struct Session {
  Settings settings;
  Memory memory;                // buffers of all its launches
  std::vector<Report> reports;  // of each launch, in order
};

// Kernels of one name differ in their arguments' type, which names them well enough.
template <class T>
std::string name_of() {
  char* text = abi::__cxa_demangle(typeid(T).name(), nullptr, nullptr, nullptr);
  std::string name = text ? text : typeid(T).name();
  std::free(text);
  return name.substr(name.rfind(':') + 1);
}

}  // namespace emulation

using emulation::Grid;

// Null, as a launch that went well; what goes wrong is thrown.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), Grid grid, int threads, uint32_t shared, void* stream,
                   const Arguments& a, int cluster = 1) {
  auto& session = *static_cast<emulation::Session*>(stream);
  session.reports.push_back(emulation::launch(
      emulation::name_of<Arguments>(), [&] { kernel(a); }, {grid, threads, shared, cluster},
      session.memory, session.settings));
  return nullptr;
}

}  // namespace casvit::cuda
