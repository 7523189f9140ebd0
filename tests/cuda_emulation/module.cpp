// The Python module: settings and reports here, kernels each in a file of their own.
#include "binding.h"

namespace py = pybind11;

void bind_probes(py::module_& m);     // probes.cpp
void bind_depthwise(py::module_& m);  // depthwise.cpp
void bind_mixer(py::module_& m);      // mixer.cpp

PYBIND11_MODULE(casvit_cuda_emulation, m) {
  using namespace casvit::cuda::emulation;
  py::class_<Settings>(m, "Settings")
      .def(py::init([](int schedule, uint64_t seed, bool races, const std::string& skip) {
             return Settings{schedule, seed, races, skip};
           }),
           py::arg("schedule") = 0, py::arg("seed") = 0, py::arg("races") = true,
           py::arg("skip") = "");
  py::class_<Report>(m, "Report")
      .def_readonly("kernel", &Report::kernel)
      .def_readonly("sites", &Report::sites)
      .def_property_readonly("traffic", [](const Report& r) {  // bytes read and written
        py::dict rows;
        for (const auto& b : r.traffic) rows[py::str(b.name)] = py::make_tuple(b.read, b.written);
        return rows;
      });
  bind_probes(m);
  bind_depthwise(m);
  bind_mixer(m);
}
