// The phases of training as operators on CPU tensors; see csrc/cpu/train.h. No arithmetic here.
#include <tuple>

#include "bindings/phases.h"

namespace {

using namespace casvit::binding;

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
  const casvit::Precision precision = precision_for(dtype);
  casvit::project(problem,
                  casvit::pack_qkv(problem.kernels, C, weight, bias, precision, problem.pool),
                  precision, input, write(qkv));
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

std::tuple<Tensor, Tensor, Tensor> project_backward(const Tensor& grad_qkv, const Tensor& x,
                                                    const Tensor& qkv_weight, ScalarType dtype,
                                                    bool need_x, bool need_weight, bool need_bias) {
  const casvit::Precision precision = precision_for(dtype);
  const casvit::Input input = input_of(x, "x");
  const Shape shape = shape_of(x.sizes(), qkv_weight);
  const int64_t C = shape.C;
  const casvit::Source weight = source(qkv_weight, "qkv_weight", 3 * C * C, 4);
  const casvit::TrainingProblem problem = shape.problem();
  STD_TORCH_CHECK(!shape.empty(), "cpu_project_backward: expected pixels");
  const float* grad = read(grad_qkv, "grad_qkv", shape.B * shape.H * shape.W * 3 * C);
  Tensor grad_x = need_x ? empty_output(x, x.scalar_type()) : empty({0});
  Tensor grad_weight = empty({need_weight ? 3 * C : 0, C});
  Tensor grad_bias = empty({need_bias ? 3 * C : 0});
  const casvit::Output output = output_of(grad_x, x);
  casvit::qkv_backward(
      problem, grad,
      {&weight, precision, &input, need_x ? &output : nullptr,
       need_weight ? write(grad_weight) : nullptr, need_bias ? write(grad_bias) : nullptr});
  return {grad_x, grad_weight, grad_bias};
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
}
