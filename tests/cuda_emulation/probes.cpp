// Binds the probes, and the conversions.
#include "probes.h"

#include "binding.h"

namespace py = pybind11;

namespace {

using namespace casvit::cuda;
using namespace casvit::cuda::emulation;

template <int N, bool TRANSPOSED>
Report ldmatrix(const py::array& rows, const py::array& words, const Settings& s) {
  Memory memory;
  const auto* from = reinterpret_cast<const uint4*>(input<uint16_t>(memory, "rows", rows));
  auto* to = output<uint32_t>(memory, "words", words);
  return launch(
      "ldmatrix", [&] { probes::ldmatrix_probe<N, TRANSPOSED>(from, to); }, {{}, 32, 512}, memory,
      s);
}

template <class T>
Report mma_of(const py::array& a, const py::array& b, const py::array& c, const py::array& d,
              const Settings& s) {
  Memory memory;
  const auto* a_of = reinterpret_cast<const uint4*>(input<uint32_t>(memory, "a", a));
  const auto* b_of = reinterpret_cast<const uint2*>(input<uint32_t>(memory, "b", b));
  const auto* c_of = reinterpret_cast<const float4*>(input<float>(memory, "c", c));
  auto* d_of = reinterpret_cast<float4*>(output<float>(memory, "d", d));
  return launch(
      "mma", [&] { probes::mma_probe<T>(a_of, b_of, c_of, d_of); }, {{}, 32, 0}, memory, s);
}

template <class T>
Report product(const py::array& a, const py::array& b, const py::array& d, const Settings& s) {
  Memory memory;
  const auto* a_of = reinterpret_cast<const uint4*>(input<uint16_t>(memory, "a", a));
  const auto* b_of = reinterpret_cast<const uint4*>(input<uint16_t>(memory, "b", b));
  auto* d_of = reinterpret_cast<float2*>(output<float>(memory, "d", d));
  return launch(
      "product", [&] { probes::product_probe<T>(a_of, b_of, d_of); }, {{}, 32, 768}, memory, s);
}

// Two launches on the same buffers; the second one's report.
Report transpose(const py::array& from, const py::array& to, const Settings& s) {
  Memory memory;
  const float* in = input<float>(memory, "from", from);
  float* out = output<float>(memory, "to", to);
  const int tiles = static_cast<int>(from.size() / 256);
  const auto kernel = [&] { probes::transpose_probe(in, out, tiles); };
  launch("transpose", kernel, {{}, 256, 1024}, memory, s);
  return launch("transpose", kernel, {{}, 256, 1024}, memory, s);
}

Report double_buffer(const py::array& from, const py::array& to, const Settings& s) {
  Memory memory;
  const auto* in = reinterpret_cast<const float4*>(input<float>(memory, "from", from));
  auto* out = reinterpret_cast<float4*>(output<float>(memory, "to", to));
  const int blocks = static_cast<int>(to.size() / 256);
  const int tiles = static_cast<int>(from.size() / 256 / blocks);
  return launch(
      "double_buffer", [&] { probes::double_buffer_probe(in, out, tiles); }, {{blocks}, 64, 2048},
      memory, s);
}

Report warp(const py::array& from, const py::array& mirrored, const py::array& sums,
            const py::array& votes, const Settings& s) {
  Memory memory;
  const float* in = input<float>(memory, "from", from);
  float* out = output<float>(memory, "mirrored", mirrored);
  float* all = output<float>(memory, "sums", sums);
  auto* ballots = output<uint32_t>(memory, "votes", votes);
  return launch(
      "warp", [&] { probes::warp_probe(in, out, all, ballots); }, {{}, 128, 512}, memory, s);
}

Report cluster(const py::array& from, const py::array& to, int cluster, int turns,
               const Settings& s) {
  Memory memory;
  const float* in = input<float>(memory, "from", from);
  float* out = output<float>(memory, "to", to);
  const int blocks = static_cast<int>(from.size() / 64);
  return launch(
      "cluster", [&] { probes::cluster_probe(in, out, cluster, turns); },
      {{blocks}, 64, 256, cluster}, memory, s);
}

Report fault(int number, const py::array& from, const py::array& to, const Settings& s) {
  Memory memory;
  const float* in = input<float>(memory, "from", from);
  float* out = output<float>(memory, "to", to);
  return launch("fault", [&] { probes::fault_probe(number, in, out); }, {{}, 64, 1024}, memory, s);
}

Report race(int first, int second, int other, int offset, int between, const py::array& from,
            const Settings& s) {
  Memory memory;
  const float* in = input<float>(memory, "from", from);
  return launch(
      "race", [&] { probes::race_probe(first, second, other, offset, between, in); }, {{}, 64, 512},
      memory, s);
}

Report cluster_race(bool store_first, int between, const Settings& s) {
  Memory memory;
  return launch(
      "cluster_race", [&] { probes::cluster_race_probe(store_first, between); }, {{2}, 32, 128, 2},
      memory, s);
}

Report readers(int other, int between, const Settings& s) {
  Memory memory;
  return launch(
      "readers", [&] { probes::readers_probe(other, between); }, {{}, 64, 256}, memory, s);
}

Report poison(const py::array& from, const py::array& to, const Settings& s) {
  Memory memory;
  const auto* in = reinterpret_cast<const float4*>(input<float>(memory, "from", from));
  auto* out = output<uint32_t>(memory, "to", to);
  const int blocks = static_cast<int>(to.size() / 64);
  return launch("poison", [&] { probes::poison_probe(in, out); }, {{blocks}, 32, 1024}, memory, s);
}

Report own(const py::array& to, const Settings& s) {
  Memory memory;
  float* out = output<float>(memory, "to", to);
  return launch("own", [&] { probes::own_probe(out); }, {{}, 64, 256}, memory, s);
}

Report work(int count, int blocks, const Settings& s) {
  Memory memory;
  return launch("work", [&] { probes::work_probe(count); }, {{blocks}, 256, 60000}, memory, s);
}

// Float32 to 2-byte floats in the low (else the high) half of a word, and back.
py::array_t<uint16_t> narrow(const py::array_t<float>& v, bool bf16, bool low) {
  py::array_t<uint16_t> result(v.size());
  for (py::ssize_t i = 0; i < v.size(); i++) {
    const float x = v.at(i), first = low ? x : -1.0f, second = low ? -1.0f : x;
    const uint32_t word = bf16 ? pack2<Bf16>(first, second) : pack2<Fp16>(first, second);
    result.mutable_at(i) = static_cast<uint16_t>(low ? word : word >> 16);
  }
  return result;
}
py::array_t<float> widen(const py::array_t<uint16_t>& v, bool bf16, bool low) {
  py::array_t<float> result(v.size());
  for (py::ssize_t i = 0; i < v.size(); i++) {
    const uint32_t bits = v.at(i), word = low ? bits | 0xbeef0000u : bits << 16 | 0xbeefu;
    result.mutable_at(i) = low ? (bf16 ? low2<Bf16>(word) : low2<Fp16>(word))
                               : (bf16 ? high2<Bf16>(word) : high2<Fp16>(word));
  }
  return result;
}

}  // namespace

void bind_probes(py::module_& m) {
  m.def("ldmatrix_x4", &ldmatrix<4, false>);
  m.def("ldmatrix_x4_transposed", &ldmatrix<4, true>);
  m.def("ldmatrix_x2_transposed", &ldmatrix<2, true>);
  m.def("mma_bf16", &mma_of<Bf16>);
  m.def("mma_fp16", &mma_of<Fp16>);
  m.def("product_bf16", &product<Bf16>);
  m.def("product_fp16", &product<Fp16>);
  m.def("transpose", &transpose);
  m.def("double_buffer", &double_buffer);
  m.def("warp", &warp);
  m.def("cluster", &cluster);
  m.def("fault", &fault);
  m.def("race", &race);
  m.def("cluster_race", &cluster_race);
  m.def("readers", &readers);
  m.def("poison", &poison);
  m.def("own", &own);
  m.def("work", &work);
  m.def("narrow", &narrow);
  m.def("widen", &widen);
  m.def("relu", [](float x) { return relu(x); });
  m.def("sigmoid", [](float x) { return sigmoid(x); });
}
