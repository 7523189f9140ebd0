// The mixer's kernels and their launches, csrc/cuda/mixer.cu, for Python: pointers as integers.
#include "cuda/mixer.cu"

#include "cuda/backward.cu"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

namespace py = pybind11;
namespace cuda = casvit::cuda;

namespace {

using Buffer = std::tuple<std::string, uintptr_t, size_t, bool>;  // name, address, bytes, writable

void check(const char* wrong) {
  if (wrong) throw std::runtime_error(wrong);
}

struct Call {
  cuda::Problem problem{};
  cuda::emulation::Session session;

  Call(const std::vector<int>& shape, bool float16, int multiprocessors, int shared_per_block,
       int cluster, const std::vector<int>& only, int schedule, uint64_t seed, bool races,
       const std::string& skip, const std::vector<Buffer>& buffers) {
    problem = {shape.at(0),
               shape.at(1),
               shape.at(2),
               shape.at(3),
               float16,
               multiprocessors,
               shared_per_block,
               shared_per_block + cuda::kReserved,
               cluster,
               &session,
               {only.at(0), only.at(1), only.at(2), only.at(3)}};
    session.settings = {schedule, seed, races, skip};
    for (const auto& [name, address, bytes, writable] : buffers)
      session.memory.add(name, reinterpret_cast<const void*>(address), bytes, writable);
  }
};

template <class V = void>
V* at(uintptr_t address) {
  return reinterpret_cast<V*>(address);
}

cuda::Weights weights_of(const std::vector<std::pair<uintptr_t, int>>& w) {
  const auto of = [&](int i) {
    return cuda::Weight{at<const void>(w.at(i).first), w.at(i).second};
  };
  return {
      {{of(0), of(1), of(2), of(3), of(4), of(5)}, {of(6), of(7), of(8), of(9), of(10), of(11)}},
      of(12),
      of(13),
      of(14),
      of(15)};
}

py::dict description(const cuda::Plan& p) {
  using namespace py::literals;
  const cuda::Cut& c = p.cut;
  return py::dict("images"_a = c.images, "strips"_a = c.strips, "rows"_a = p.rows,
                  "pairs"_a = c.pairs, "chunks"_a = c.chunks, "bands"_a = c.bands,
                  "columns"_a = c.columns, "halo"_a = p.halo, "shared"_a = p.shared,
                  "cost"_a = p.cost);
}

}  // namespace

// (n, d) of the first quotient that is wrong with a reciprocal off by `steps` of its last place; a
// quotient changes, if at all, at multiples of d.
std::pair<int, int> first_wrong_quotient(int steps) {
  for (int d = 1; d < 32768; ++d) {
    float reciprocal = 1.0f / static_cast<float>(d);
    for (int i = 0; i < std::abs(steps); ++i)
      reciprocal = std::nextafterf(reciprocal, steps < 0 ? 0.0f : 2.0f);
    const cuda::Divisor by_d(d, reciprocal);
    for (int n = 0; n < 65536; n += d)
      for (const int near : {n - 1, n})
        if (near >= 0 && by_d.quotient(near) != near / d) return {near, d};
  }
  return {0, 0};
}

void bind_mixer(py::module_& m) {
  m.def("first_wrong_quotient", &first_wrong_quotient);
  m.def("packed_words", &cuda::packed_words);
  m.def("backward_packed_words", &cuda::backward_packed_words);
  m.def("set_most_groups", [](int groups) { cuda::most_groups = groups; });
  m.def("set_launches", [](int wanted) { cuda::wanted_launches = wanted; });
  py::class_<Call>(m, "MixerCall")
      .def(py::init<std::vector<int>, bool, int, int, int, std::vector<int>, int, uint64_t, bool,
                    std::string, std::vector<Buffer>>())
      .def("parts",
           [](Call& c) {
             cuda::Parts parts;
             check(cuda::parts(c.problem, &parts));
             return std::make_pair(parts.sums, parts.moments);
           })
      .def("plans",
           [](Call& c) {
             const cuda::Plans p = cuda::plans(c.problem);
             return std::make_tuple(description(p.gates), description(p.statistics),
                                    description(p.combine), description(p.backward_combine),
                                    description(p.backward_gate), description(p.backward_depthwise),
                                    description(p.single_pass));
           })
      .def("prefers_single_pass",
           [](Call& c) { return cuda::plans(c.problem).prefers_single_pass; })
      .def("pack",
           [](Call& c, const std::vector<std::pair<uintptr_t, int>>& w, uintptr_t statistics,
              float eps_q, float eps_k, uintptr_t packed) {
             const float eps[2] = {eps_q, eps_k};
             check(cuda::pack(c.problem, weights_of(w), at<const float>(statistics), eps,
                              at(packed)));
           })
      .def("statistics",
           [](Call& c, uintptr_t qkv, uintptr_t packed, uintptr_t counts, uintptr_t moments,
              uintptr_t result) {
             check(cuda::statistics(c.problem, at<const void>(qkv), at<const void>(packed),
                                    at<float>(counts), at<float>(moments), at<float>(result)));
           })
      .def("mix",
           [](Call& c, uintptr_t qkv, uintptr_t packed, uintptr_t sums, uintptr_t spatial,
              uintptr_t pooled, uintptr_t channel, uintptr_t out, bool channels_last) {
             check(cuda::mix(c.problem, at<const void>(qkv), at<const void>(packed),
                             at<float>(sums), at<float>(spatial), at<float>(pooled),
                             at<float>(channel), at(out), channels_last));
           })
      .def("backward_parts",
           [](Call& c) {
             cuda::BackwardParts parts;
             check(cuda::backward_parts(c.problem, &parts));
             return std::make_tuple(parts.slices, parts.bands, parts.combine_blocks,
                                    parts.gate_blocks, parts.depthwise_blocks);
           })
      .def("pack_backward",
           [](Call& c, const std::vector<std::pair<uintptr_t, int>>& w, uintptr_t statistics,
              float eps_q, float eps_k, uintptr_t packed) {
             const float eps[2] = {eps_q, eps_k};
             check(cuda::pack_backward(c.problem, weights_of(w), at<const float>(statistics), eps,
                                       at(packed)));
           })
      .def("backward_combine",
           [](Call& c, uintptr_t qkv, uintptr_t packed, uintptr_t spatial, uintptr_t gates,
              uintptr_t grad, uintptr_t grad_qkv, uintptr_t grad_sum, uintptr_t pixel,
              uintptr_t channel_sums, uintptr_t weights) {
             check(cuda::backward_combine(
                 c.problem, at<const void>(qkv), at<const void>(packed), at<const float>(spatial),
                 at<const float>(gates), at<const void>(grad), at(grad_qkv), at(grad_sum),
                 at<float>(pixel), at<float>(channel_sums), at<float>(weights)));
           })
      .def("backward_gate",
           [](Call& c, uintptr_t qkv, uintptr_t packed, uintptr_t spatial, uintptr_t pixel,
              uintptr_t shift, uintptr_t logit, uintptr_t sums) {
             check(cuda::backward_gate(c.problem, at<const void>(qkv), at<const void>(packed),
                                       at<const float>(spatial), at<const float>(pixel),
                                       at<const float>(shift), at<float>(logit), at<float>(sums)));
           })
      .def("backward_depthwise",
           [](Call& c, uintptr_t qkv, uintptr_t packed, uintptr_t spatial, uintptr_t logit,
              uintptr_t gates, uintptr_t shift, uintptr_t coefficients, uintptr_t grad_sum,
              uintptr_t grad_qkv, uintptr_t weights) {
             check(cuda::backward_depthwise(c.problem, at<const void>(qkv), at<const void>(packed),
                                            at<const float>(spatial), at<const float>(logit),
                                            at<const float>(gates), at<const float>(shift),
                                            at<const float>(coefficients), at<const void>(grad_sum),
                                            at(grad_qkv), at<float>(weights)));
           })
      .def("traffic",  // of each launch: its arguments' type, and by buffer bytes read and written
           [](const Call& c) {
             std::vector<
                 std::pair<std::string, std::vector<std::tuple<std::string, uint64_t, uint64_t>>>>
                 launches;
             for (const auto& report : c.session.reports) {
               launches.push_back({report.kernel, {}});
               for (const auto& b : report.traffic)
                 launches.back().second.emplace_back(b.name, b.read, b.written);
             }
             return launches;
           })
      .def("sites", [](const Call& c) {
        std::vector<std::string> sites;
        for (const auto& report : c.session.reports)
          sites.insert(sites.end(), report.sites.begin(), report.sites.end());
        return sites;
      });
}
