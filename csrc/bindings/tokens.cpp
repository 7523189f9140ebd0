// The operator of token clustering on CPU tensors; its schema is in
// casvit_kernels/ops/tokens/schema.py. No arithmetic here.
#include "bindings/tensors.h"
#include "cpu/dispatch.h"
#include "cpu/tokens/cluster.h"

namespace {

using namespace casvit::binding;
using torch::headeronly::IntHeaderOnlyArrayRef;

std::tuple<Tensor, Tensor> cluster_tokens(const Tensor& x, IntHeaderOnlyArrayRef size,
                                          IntHeaderOnlyArrayRef grid, int64_t iterations,
                                          int64_t window, double temperature) {
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions (B, N, C), got ", x.dim());
  const casvit::DType dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(size.size() == 2, "size: expected (H, W), got ", size.size(), " numbers");
  STD_TORCH_CHECK(grid.size() == 2, "grid: expected (h, w), got ", grid.size(), " numbers");
  for (size_t i = 0; i < 2; ++i)
    STD_TORCH_CHECK(0 < grid[i] && grid[i] <= size[i], "grid: expected 1 to ", size[i], ", got ",
                    grid[i]);
  STD_TORCH_CHECK(x.size(1) == size[0] * size[1], "x: expected ", size[0] * size[1],
                  " tokens in dimension 1, got ", x.size(1));
  STD_TORCH_CHECK(iterations >= 0, "iterations: expected at least 0, got ", iterations);
  STD_TORCH_CHECK(window > 0 && window % 2 == 1, "window: expected an odd number, got ", window);
  const int64_t B = x.size(0), C = x.size(2);
  const casvit::TokenMap map{C, 0, {size[0], size[1]}, {grid[0], grid[1]}, window / 2};
  const int64_t centres_shape[] = {B, map.cells(), C};
  const int64_t affinity_shape[] = {B, map.tokens(), map.slots()};
  Tensor centres = torch::stable::empty({centres_shape, 3}, x.scalar_type());
  Tensor affinity = torch::stable::empty({affinity_shape, 3}, ScalarType::Float);
  if (B == 0) return {centres, affinity};
  const bool consecutive = C <= 1 || x.strides()[2] == 1;
  const Tensor rows = consecutive ? x : torch::stable::contiguous(x);
  casvit::cluster_tokens(
      casvit::active_kernels(), map,
      {C ? rows.const_data_ptr() : nullptr, dtype, B, rows.strides()[0], rows.strides()[1]},
      iterations, static_cast<float>(temperature), centres.mutable_data_ptr(),
      static_cast<float*>(affinity.mutable_data_ptr()), thread_pool());
  return {centres, affinity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(casvit_kernels, CPU, m) {
  m.impl("cpu_cluster_tokens", TORCH_BOX(&cluster_tokens));
}
