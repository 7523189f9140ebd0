// The phases of training as operators on CPU tensors; see csrc/cpu/train.h. No arithmetic here.
#include <cstring>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "bindings/tensors.h"
#include "cpu/dispatch.h"
#include "cpu/train.h"

namespace {

using namespace casvit::binding;
using torch::headeronly::IntHeaderOnlyArrayRef;
using Sizes = std::initializer_list<int64_t>;

// What every phase starts from; in a map without pixels there is nothing to do.
struct Shape {
  int64_t B, C, H, W;
  bool empty() const { return B * C * H * W == 0; }
  casvit::TrainingProblem problem() const {
    return {casvit::active_kernels(), B, C, H, W, thread_pool()};
  }
};
Shape shape_of(IntHeaderOnlyArrayRef sizes, const Tensor& qkv_weight) {
  STD_TORCH_CHECK(sizes.size() == 4, "shape: expected 4 sizes (B, C, H, W), got ", sizes.size());
  STD_TORCH_CHECK(qkv_weight.dim() == 4, "qkv_weight: expected 4 dimensions, got ",
                  qkv_weight.dim());
  for (size_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(sizes[i] >= 0, "shape: expected no negative size, got ", sizes[i]);
  STD_TORCH_CHECK(sizes[1] == qkv_weight.size(1), "shape: expected ", qkv_weight.size(1),
                  " channels, got ", sizes[1]);
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

// Results of phases are float32 whatever the dtype of x.
Tensor empty(Sizes sizes) {
  const std::vector<int64_t> list(sizes);
  return torch::stable::empty(list, ScalarType::Float);
}
Tensor zeros(Sizes sizes) {
  Tensor t = empty(sizes);
  if (t.numel()) std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(t.numel()) * 4);
  return t;
}
float* write(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void check_floats(const Tensor& t, const char* name, int64_t numel) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name,
                  ": expected float32, got scalar type ", static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(t.numel() == numel, name, ": expected ", numel, " elements, got ", t.numel());
}
const float* read(const Tensor& t, const char* name, int64_t numel) {
  check_floats(t, name, numel);
  return static_cast<const float*>(t.const_data_ptr());
}

// The sources with `statistics` (2, 2, C) in place of the running ones.
casvit::Sources with_statistics(casvit::Sources s, const Tensor& statistics) {
  const float* from = read(statistics, "statistics", 4 * s.C);
  for (int i = 0; i < 2; ++i) {
    casvit::Source mean;
    mean.data = from + 2 * i * s.C;
    mean.stride[0] = 1;
    mean.span = s.C;
    casvit::Source var = mean;
    var.data = from + (2 * i + 1) * s.C;
    s.gate[i].norm_mean = mean;
    s.gate[i].norm_var = var;
  }
  return s;
}

void project(const Tensor& x, const Tensor& qkv_weight, const Optional& qkv_bias, ScalarType dtype,
             Tensor qkv) {
  const casvit::Input input = input_of(x, "x");
  const Shape shape = shape_of(x.sizes(), qkv_weight);
  const int64_t C = shape.C;
  const casvit::Source weight = source(qkv_weight, "qkv_weight", 3 * C * C, 4);
  const casvit::Source bias = source(qkv_bias, "qkv_bias", 3 * C, 1);
  if (shape.empty()) return;
  const casvit::TrainingProblem problem = shape.problem();
  check_floats(qkv, "qkv", problem.qkv_floats());
  const casvit::Product kind = product_for(dtype);
  casvit::project(problem,
                  casvit::pack_product(problem.kernels, C, weight, bias, kind, problem.pool), kind,
                  input, write(qkv));
}

Tensor statistics(const Tensor& qkv, IntHeaderOnlyArrayRef sizes, WEIGHT_PARAMETERS) {
  const Shape shape = shape_of(sizes, qkv_weight);
  const int64_t C = shape.C;
  const casvit::Sources sources WEIGHT_SOURCES;
  if (shape.empty()) return zeros({2, 2, C});
  const casvit::TrainingProblem problem = shape.problem();
  Tensor moments = empty({2, 2, C});
  casvit::statistics(problem, casvit::pack_taps(problem.kernels, sources),
                     read(qkv, "qkv", problem.qkv_floats()), write(moments));
  return moments;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix(const Tensor& x, const Tensor& qkv,
                                               WEIGHT_PARAMETERS, const Tensor& statistics,
                                               ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected 4 dimensions (B, C, H, W), got ", x.dim());
  const Shape shape = shape_of(x.sizes(), qkv_weight);
  const int64_t B = shape.B, C = shape.C;
  const casvit::Sources sources = with_statistics(casvit::Sources WEIGHT_SOURCES, statistics);
  Tensor out = empty_output(x, dtype);
  const casvit::Output output = output_of(out, x);
  if (shape.empty())
    return {out, zeros({B, 2, shape.H, shape.W}), zeros({2, B, C}), zeros({2, B, C})};
  const casvit::TrainingProblem problem = shape.problem();
  Tensor spatial = empty({B, 2, shape.H, shape.W}), pooled = empty({2, B, C}),
         channel = empty({2, B, C});
  casvit::mix(problem, casvit::pack_mixing(problem.kernels, sources, problem.pool),
              read(qkv, "qkv", problem.qkv_floats()), output, write(spatial), write(pooled),
              write(channel));
  return {out, spatial, pooled, channel};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_combine(
    const Tensor& grad, const Tensor& qkv, WEIGHT_PARAMETERS, const Tensor& spatial,
    const Tensor& channel, Tensor grad_qkv, Tensor grad_sum) {
  const casvit::Input input = input_of(grad, "grad");
  const Shape shape = shape_of(grad.sizes(), qkv_weight);
  const int64_t B = shape.B, C = shape.C, pixels = shape.H * shape.W;
  const casvit::Sources sources WEIGHT_SOURCES;
  if (shape.empty())
    return {zeros({B, 2, shape.H, shape.W}),
            zeros({2, B, C}),
            zeros({C, 1, 3, 3}),
            zeros({C}),
            zeros({C, 1, 3, 3}),
            zeros({C})};
  const casvit::TrainingProblem problem = shape.problem();
  const float* from_qkv = read(qkv, "qkv", problem.qkv_floats());
  const float* from_spatial = read(spatial, "spatial", B * 2 * pixels);
  const float* from_channel = read(channel, "channel", 2 * B * C);
  check_floats(grad_qkv, "grad_qkv", B * pixels * 3 * C);
  check_floats(grad_sum, "grad_sum", problem.grad_sum_floats());
  Tensor pixel = empty({B, 2, shape.H, shape.W}), channel_sum = empty({2, B, C}),
         dwc = empty({C, 1, 3, 3}), dwc_b = empty({C}), proj = empty({C, 1, 3, 3}),
         proj_b = empty({C});
  casvit::backward_combine(problem, casvit::pack_combine(problem.kernels, sources), input, from_qkv,
                           from_spatial, from_channel,
                           {write(grad_qkv), write(grad_sum), write(pixel), write(channel_sum),
                            write(dwc), write(dwc_b), write(proj), write(proj_b)});
  return {pixel, channel_sum, dwc, dwc_b, proj, proj_b};
}

std::tuple<Tensor, Tensor, Tensor> backward_gate(const Tensor& qkv, IntHeaderOnlyArrayRef sizes,
                                                 WEIGHT_PARAMETERS, const Tensor& statistics,
                                                 const Tensor& spatial, const Tensor& pixel,
                                                 const Tensor& shift) {
  const Shape shape = shape_of(sizes, qkv_weight);
  const int64_t B = shape.B, C = shape.C, maps = B * 2 * shape.H * shape.W;
  const casvit::Sources sources = with_statistics(casvit::Sources WEIGHT_SOURCES, statistics);
  if (shape.empty()) return {zeros({B, 2, shape.H, shape.W}), zeros({2, C}), zeros({2, 2, C})};
  const casvit::TrainingProblem problem = shape.problem();
  const float* from_qkv = read(qkv, "qkv", problem.qkv_floats());
  const float* from_spatial = read(spatial, "spatial", maps);
  const float* from_pixel = read(pixel, "pixel", maps);
  const float* from_shift = read(shift, "shift", 2 * B * C);
  Tensor logit = empty({B, 2, shape.H, shape.W}), weight = empty({2, C}), sums = empty({2, 2, C});
  casvit::backward_gate(problem, casvit::pack_gates(problem.kernels, sources), from_qkv,
                        from_spatial, from_pixel, from_shift,
                        {write(logit), {write(weight), write(weight) + C}, write(sums)});
  return {logit, weight, sums};
}

std::tuple<Tensor, Tensor> backward_depthwise(const Tensor& qkv, IntHeaderOnlyArrayRef sizes,
                                              WEIGHT_PARAMETERS, const Tensor& statistics,
                                              const Tensor& spatial, const Tensor& channel,
                                              const Tensor& shift, const Tensor& logit,
                                              const Tensor& coefficients, const Tensor& grad_sum,
                                              Tensor grad_qkv) {
  const Shape shape = shape_of(sizes, qkv_weight);
  const int64_t B = shape.B, C = shape.C, pixels = shape.H * shape.W;
  const casvit::Sources sources = with_statistics(casvit::Sources WEIGHT_SOURCES, statistics);
  if (shape.empty()) return {zeros({2, C, 3, 3}), zeros({2, C})};
  const casvit::TrainingProblem problem = shape.problem();
  const float* from_qkv = read(qkv, "qkv", problem.qkv_floats());
  const float* from_spatial = read(spatial, "spatial", B * 2 * pixels);
  const float* from_channel = read(channel, "channel", 2 * B * C);
  const float* from_shift = read(shift, "shift", 2 * B * C);
  const float* from_logit = read(logit, "logit", B * 2 * pixels);
  const float* factors = read(coefficients, "coefficients", 6 * C);
  const float* from_sum = read(grad_sum, "grad_sum", problem.grad_sum_floats());
  check_floats(grad_qkv, "grad_qkv", B * pixels * 3 * C);
  Tensor weight = empty({2, C, 3, 3}), bias = empty({2, C});
  casvit::backward_depthwise(
      problem, casvit::pack_gates(problem.kernels, sources), from_qkv, from_spatial, from_channel,
      from_shift, from_logit, factors, from_sum,
      {write(grad_qkv), {write(weight), write(weight) + 9 * C}, {write(bias), write(bias) + C}});
  return {weight, bias};
}

std::tuple<Tensor, Tensor> project_backward(const Tensor& grad_qkv, const Tensor& x,
                                            const Tensor& qkv_weight, ScalarType dtype, bool need_x,
                                            bool need_weight) {
  const casvit::Product kind = product_for(dtype);
  const casvit::Input input = input_of(x, "x");
  const Shape shape = shape_of(x.sizes(), qkv_weight);
  const int64_t C = shape.C;
  const casvit::Source weight = source(qkv_weight, "qkv_weight", 3 * C * C, 4);
  const casvit::TrainingProblem problem = shape.problem();
  STD_TORCH_CHECK(problem.kernels.input_gradient && !shape.empty(),
                  "cpu_project_backward: expected kernels that have it, and pixels");
  const float* grad = read(grad_qkv, "grad_qkv", shape.B * shape.H * shape.W * 3 * C);
  Tensor grad_x = need_x ? empty_output(x, x.scalar_type()) : empty({0});
  Tensor grad_weight = empty({need_weight ? 3 * C : 0, C});
  const casvit::Output output = output_of(grad_x, x);
  casvit::product_backward(problem, grad,
                           {&weight, kind, &input, need_x ? &output : nullptr,
                            need_weight ? write(grad_weight) : nullptr});
  return {grad_x, grad_weight};
}

// The phases one behind the other, where nothing comes between them.

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, WEIGHT_PARAMETERS,
                                                           bool batch_q, bool batch_k,
                                                           ScalarType dtype, Tensor qkv) {
  const casvit::Input input = input_of(x, "x");
  const Shape shape = shape_of(x.sizes(), qkv_weight);
  const int64_t B = shape.B, C = shape.C;
  const casvit::Sources sources WEIGHT_SOURCES;
  STD_TORCH_CHECK(!shape.empty(), "cpu_forward: expected pixels");
  const casvit::TrainingProblem problem = shape.problem();
  check_floats(qkv, "qkv", problem.qkv_floats());
  const casvit::Product kind = product_for(dtype);
  casvit::project(problem,
                  casvit::pack_product(problem.kernels, C, sources.qkv_weight, sources.qkv_bias,
                                       kind, problem.pool),
                  kind, input, write(qkv));
  Tensor used = empty({2, 2, C});
  if (batch_q || batch_k)
    casvit::statistics(problem, casvit::pack_taps(problem.kernels, sources), write(qkv),
                       write(used));
  for (int i = 0; i < 2; ++i) {
    if (i == 0 ? batch_q : batch_k) continue;
    const casvit::GateSources& gate = sources.gate[i];
    STD_TORCH_CHECK(gate.norm_mean.data && gate.norm_var.data,
                    "norm_mean, norm_var: expected running statistics, got None");
    casvit::pack_vector(gate.norm_mean, C, write(used) + 2 * i * C);
    casvit::pack_vector(gate.norm_var, C, write(used) + (2 * i + 1) * C);
  }
  Tensor out = empty_output(x, dtype), spatial = empty({B, 2, shape.H, shape.W}),
         pooled = empty({2, B, C}), channel = empty({2, B, C});
  casvit::mix(problem,
              casvit::pack_mixing(problem.kernels, with_statistics(sources, used), problem.pool),
              write(qkv), output_of(out, x), write(spatial), write(pooled), write(channel));
  return {out, used, spatial, pooled, channel};
}

// needed: bit i stands for x and the weights in the order of the schema. Returns the gradients of
// those from the gates on, before them, where kernels have these, of x and the product's weights;
// and leaves in grad_qkv what the others need.
std::vector<Tensor> backward(const Tensor& grad, const Tensor& x, WEIGHT_PARAMETERS, bool batch_q,
                             bool batch_k, ScalarType dtype, const Tensor& statistics,
                             const Tensor& spatial, const Tensor& pooled, const Tensor& channel,
                             int64_t needed, Tensor qkv, Tensor grad_qkv, Tensor grad_sum) {
  const casvit::Input input = input_of(x, "x"), grad_input = input_of(grad, "grad");
  const Shape shape = shape_of(x.sizes(), qkv_weight);
  const int64_t B = shape.B, C = shape.C, pixels = shape.H * shape.W;
  const casvit::Sources sources = with_statistics(casvit::Sources WEIGHT_SOURCES, statistics);
  STD_TORCH_CHECK(!shape.empty(), "cpu_backward: expected pixels");
  STD_TORCH_CHECK(grad.sizes() == x.sizes(), "grad: expected the shape of x");
  const float* from_spatial = read(spatial, "spatial", B * 2 * pixels);
  const float* from_pooled = read(pooled, "pooled", 2 * B * C);
  const float* from_channel = read(channel, "channel", 2 * B * C);
  const casvit::TrainingProblem problem = shape.problem();
  check_floats(qkv, "qkv", problem.qkv_floats());
  check_floats(grad_qkv, "grad_qkv", B * pixels * 3 * C);
  check_floats(grad_sum, "grad_sum", problem.grad_sum_floats());

  enum { X, QKV_WEIGHT, QKV_BIAS, GATES, OF_GATE = 8, DWC = GATES + 2 * OF_GATE, END = DWC + 4 };
  enum { DEPTHWISE, DEPTHWISE_BIAS, NORM, NORM_BIAS, MEAN, VAR, SPATIAL, CHANNEL };
  auto any = [&](std::initializer_list<int> bits) {
    for (int bit : bits)
      if (needed >> bit & 1) return true;
    return false;
  };
  auto any_of_gates = [&](std::initializer_list<int> fields) {
    for (int field : fields)
      if (any({GATES + field, GATES + OF_GATE + field})) return true;
    return false;
  };
  const bool need_depthwise =
      any({X, QKV_WEIGHT, QKV_BIAS}) || any_of_gates({DEPTHWISE, DEPTHWISE_BIAS});
  const bool need_gate = need_depthwise || any_of_gates({NORM, NORM_BIAS, SPATIAL});
  const bool products = problem.kernels.input_gradient;
  std::vector<Tensor> found(END);
  auto make = [&](int index, Sizes sizes) {
    found[static_cast<size_t>(index)] = empty(sizes);
    return write(found[static_cast<size_t>(index)]);
  };

  const casvit::Product kind = product_for(dtype);
  casvit::project(problem,
                  casvit::pack_product(problem.kernels, C, sources.qkv_weight, sources.qkv_bias,
                                       kind, problem.pool),
                  kind, input, write(qkv));
  Tensor pixel = empty({B, 2, shape.H, shape.W}), channel_sum = empty({2, B, C});
  casvit::backward_combine(
      problem, casvit::pack_combine(problem.kernels, sources), grad_input, write(qkv), from_spatial,
      from_channel,
      {write(grad_qkv), write(grad_sum), write(pixel), write(channel_sum), make(DWC, {C, 1, 3, 3}),
       make(DWC + 1, {C}), make(DWC + 2, {C, 1, 3, 3}), make(DWC + 3, {C})});
  Tensor shift = empty({2, B, C});
  if (need_gate || any_of_gates({CHANNEL})) {
    float* of_channel[2];
    for (int i = 0; i < 2; ++i) {
      const int at = GATES + i * OF_GATE + CHANNEL;
      of_channel[i] = any({at}) ? make(at, {C, C, 1, 1}) : nullptr;
    }
    casvit::backward_channel_gate(problem, sources, write(channel_sum), from_pooled, from_channel,
                                  write(shift), {of_channel[0], of_channel[1]});
  }
  if (need_gate) {
    const casvit::TrainingGates gates = casvit::pack_gates(problem.kernels, sources);
    Tensor logit = empty({B, 2, shape.H, shape.W}), sums = empty({2, 2, C});
    casvit::GateGradients of_gate{write(logit), {}, write(sums)};
    casvit::DepthwiseGradients of_depthwise{write(grad_qkv), {}, {}};
    for (int i = 0; i < 2; ++i) {
      const int at = GATES + i * OF_GATE;
      of_gate.spatial_weight[i] = make(at + SPATIAL, {1, C, 1, 1});
      of_depthwise.weight[i] = make(at + DEPTHWISE, {C, 1, 3, 3});
      of_depthwise.bias[i] = make(at + DEPTHWISE_BIAS, {C});
    }
    casvit::backward_gate(problem, gates, write(qkv), from_spatial, write(pixel), write(shift),
                          of_gate);
    for (int i = 0; i < 2; ++i) {
      const int at = GATES + i * OF_GATE;
      const float* from = of_gate.sums + 2 * i * C;
      std::memcpy(make(at + NORM_BIAS, {C}), from, sizeof(float) * static_cast<size_t>(C));
      std::memcpy(make(at + NORM, {C}), from + C, sizeof(float) * static_cast<size_t>(C));
    }
    if (need_depthwise) {
      Tensor factors = empty({2, 3, C});
      casvit::coefficients(problem, sources, write(sums), {batch_q, batch_k}, write(factors));
      casvit::Output output{};
      casvit::ProductGradients product{&sources.qkv_weight, kind, &input, nullptr, nullptr};
      if (products && any({X})) {
        found[X] = empty_output(x, x.scalar_type());
        output = output_of(found[X], x);
        product.grad_x = &output;
      }
      if (products && any({QKV_WEIGHT})) product.grad_weight = make(QKV_WEIGHT, {3 * C, C});
      casvit::backward_depthwise(problem, gates, write(qkv), from_spatial, from_channel,
                                 write(shift), write(logit), write(factors), write(grad_sum),
                                 of_depthwise,
                                 products && any({X, QKV_WEIGHT}) ? &product : nullptr);
    }
  }
  std::vector<Tensor> result;
  for (int i = 0; i < END; ++i)
    if (any({i}) && (i >= GATES || (products && i != QKV_BIAS)))
      result.push_back(found[static_cast<size_t>(i)]);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(casvit_kernels, CPU, m) {
  m.impl("cpu_project", TORCH_BOX(&project));
  m.impl("cpu_statistics", TORCH_BOX(&statistics));
  m.impl("cpu_mix", TORCH_BOX(&mix));
  m.impl("cpu_backward_combine", TORCH_BOX(&backward_combine));
  m.impl("cpu_backward_gate", TORCH_BOX(&backward_gate));
  m.impl("cpu_backward_depthwise", TORCH_BOX(&backward_depthwise));
  m.impl("cpu_project_backward", TORCH_BOX(&project_backward));
  m.impl("cpu_forward", TORCH_BOX(&forward));
  m.impl("cpu_backward", TORCH_BOX(&backward));
}
