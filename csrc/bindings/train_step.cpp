// A whole training step as operators on CPU tensors, each way in one call: the phases of train.cpp
// one behind the other, where nothing comes between them.
#include <tuple>

#include "bindings/phases.h"

namespace {

using namespace casvit::binding;

// Gradients: of x and of the weights, in the order of the schema.
#define CASVIT_INDEX(prefix, field, ...) AT_##prefix##field,
enum Gradient { AT_x, CASVIT_MIXER_WEIGHTS(CASVIT_INDEX) GRADIENTS };
#undef CASVIT_INDEX
constexpr int OF_GATE = AT_k_depthwise_weight - AT_q_depthwise_weight;

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
  const casvit::Precision precision = precision_for(dtype);
  casvit::project(problem,
                  casvit::pack_qkv(problem.kernels, C, sources.qkv_weight, sources.qkv_bias,
                                   precision, problem.pool),
                  precision, input, write(qkv));
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

// needed: bit i stands for x (0) and the weights in the order of the schema. Returns the gradients
// of those, in order.
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

  auto any = [&](std::initializer_list<int> gradients) {
    for (int i : gradients)
      if (needed >> i & 1) return true;
    return false;
  };
  auto any_of_gates = [&](std::initializer_list<int> of_q) {
    for (int i : of_q)
      if (any({i, i + OF_GATE})) return true;
    return false;
  };
  const bool need_depthwise = any({AT_x, AT_qkv_weight, AT_qkv_bias}) ||
                              any_of_gates({AT_q_depthwise_weight, AT_q_depthwise_bias});
  const bool need_gate =
      need_depthwise || any_of_gates({AT_q_norm_weight, AT_q_norm_bias, AT_q_spatial_weight});
  std::vector<Tensor> found(GRADIENTS);
  auto make = [&](int index, Sizes sizes) {
    found[static_cast<size_t>(index)] = empty(sizes);
    return write(found[static_cast<size_t>(index)]);
  };

  const casvit::Precision precision = precision_for(dtype);
  casvit::project(problem,
                  casvit::pack_qkv(problem.kernels, C, sources.qkv_weight, sources.qkv_bias,
                                   precision, problem.pool),
                  precision, input, write(qkv));
  Tensor pixel = empty({B, 2, shape.H, shape.W}), channel_sum = empty({2, B, C});
  casvit::backward_combine(problem, casvit::pack_combine(problem.kernels, sources), grad_input,
                           write(qkv), from_spatial, from_channel,
                           {write(grad_qkv), write(grad_sum), write(pixel), write(channel_sum),
                            make(AT_dwc_weight, {C, 1, 3, 3}), make(AT_dwc_bias, {C}),
                            make(AT_proj_weight, {C, 1, 3, 3}), make(AT_proj_bias, {C})});
  Tensor shift = empty({2, B, C});
  if (need_gate || any_of_gates({AT_q_channel_weight})) {
    float* of_channel[2];
    for (int i = 0; i < 2; ++i) {
      const int at = AT_q_channel_weight + i * OF_GATE;
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
      of_gate.spatial_weight[i] = make(AT_q_spatial_weight + i * OF_GATE, {1, C, 1, 1});
      of_depthwise.weight[i] = make(AT_q_depthwise_weight + i * OF_GATE, {C, 1, 3, 3});
      of_depthwise.bias[i] = make(AT_q_depthwise_bias + i * OF_GATE, {C});
    }
    casvit::backward_gate(problem, gates, write(qkv), from_spatial, write(pixel), write(shift),
                          of_gate);
    for (int i = 0; i < 2; ++i) {
      const float* from = of_gate.sums + 2 * i * C;
      const size_t bytes = sizeof(float) * static_cast<size_t>(C);
      std::memcpy(make(AT_q_norm_bias + i * OF_GATE, {C}), from, bytes);
      std::memcpy(make(AT_q_norm_weight + i * OF_GATE, {C}), from + C, bytes);
    }
    if (need_depthwise) {
      Tensor factors = empty({2, 3, C});
      casvit::coefficients(problem, sources, write(sums), {batch_q, batch_k}, write(factors));
      casvit::Output output{};
      casvit::QkvGradients qkv_gradients{
          &sources.qkv_weight, precision, &input, nullptr, nullptr, nullptr};
      if (any({AT_x})) {
        found[AT_x] = empty_output(x, x.scalar_type());
        output = output_of(found[AT_x], x);
        qkv_gradients.grad_x = &output;
      }
      if (any({AT_qkv_weight})) qkv_gradients.grad_weight = make(AT_qkv_weight, {3 * C, C});
      if (any({AT_qkv_bias})) qkv_gradients.grad_bias = make(AT_qkv_bias, {3 * C});
      casvit::backward_depthwise(
          problem, gates, write(qkv), from_spatial, from_channel, write(shift), write(logit),
          write(factors), write(grad_sum), of_depthwise,
          any({AT_x, AT_qkv_weight, AT_qkv_bias}) ? &qkv_gradients : nullptr);
    }
  }
  std::vector<Tensor> result;
  for (int i = 0; i < GRADIENTS; ++i)
    if (any({i})) result.push_back(found[static_cast<size_t>(i)]);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(casvit_kernels, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&forward));
  m.impl("cpu_backward", TORCH_BOX(&backward));
}
