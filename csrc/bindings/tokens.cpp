// The operators of token clustering and reconstruction on CPU tensors; their schemas are in
// casvit_kernels/ops/tokens/schema.py. No arithmetic here.
#include "bindings/tensors.h"
#include "cpu/dispatch.h"
#include "cpu/tokens/cluster.h"
#include "cpu/tokens/reconstruct.h"

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
  for (size_t i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(0 < grid[i] && grid[i] <= size[i], "grid: expected 1 to ", size[i], ", got ",
                    grid[i]);
    STD_TORCH_CHECK(size[i] < int64_t{1} << 31, "size: expected less than 2^31, got ", size[i]);
  }
  STD_TORCH_CHECK(x.size(1) == size[0] * size[1], "x: expected ", size[0] * size[1],
                  " tokens in dimension 1, got ", x.size(1));
  STD_TORCH_CHECK(iterations > 0, "iterations: expected at least 1, got ", iterations);
  STD_TORCH_CHECK(window > 0 && window % 2 == 1 && window <= 2 * x.size(1) + 1,
                  "window: expected an odd number up to ", 2 * x.size(1) + 1, ", got ", window);
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

void check_distances(const Tensor& distances, int64_t neighbours) {
  STD_TORCH_CHECK(distances.is_cpu(), "distances: expected a CPU tensor");
  STD_TORCH_CHECK(distances.dim() == 3, "distances: expected 3 dimensions (B, N, K), got ",
                  distances.dim());
  STD_TORCH_CHECK(distances.scalar_type() == ScalarType::Float,
                  "distances: expected float32, got scalar type ",
                  static_cast<int>(distances.scalar_type()));
  STD_TORCH_CHECK(distances.size(2) > 0, "distances: expected those to some centres, got none");
  STD_TORCH_CHECK(neighbours > 0, "neighbours: expected at least 1, got ", neighbours);
}

Tensor reconstruct_tokens(const Tensor& y, const Tensor& distances, int64_t neighbours,
                          double temperature, bool l2) {
  STD_TORCH_CHECK(y.is_cpu(), "y: expected a CPU tensor");
  STD_TORCH_CHECK(y.dim() == 3, "y: expected 3 dimensions (B, K, C), got ", y.dim());
  check_distances(distances, neighbours);
  STD_TORCH_CHECK(distances.size(0) == y.size(0) && distances.size(2) == y.size(1),
                  "distances: expected those of ", y.size(0), " images to ", y.size(1),
                  " centres, got ", distances.size(0), " and ", distances.size(2));
  const int64_t B = y.size(0), K = y.size(1), C = y.size(2), N = distances.size(1);
  const casvit::Reconstruction r{
      K, C, dtype_of(y, "y"), neighbours, static_cast<float>(temperature), l2};
  const int64_t shape[] = {B, N, C};
  Tensor out = torch::stable::empty({shape, 3}, y.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor centres = torch::stable::contiguous(y), rows = torch::stable::contiguous(distances);
  casvit::reconstruct_tokens(casvit::active_kernels(), r, centres.const_data_ptr(),
                             static_cast<const float*>(rows.const_data_ptr()), B, N,
                             out.mutable_data_ptr(), thread_pool());
  return out;
}

Tensor token_weights(const Tensor& distances, int64_t neighbours, double temperature, bool l2) {
  check_distances(distances, neighbours);
  const casvit::Reconstruction r{
      distances.size(2), 0, casvit::DType::F32, neighbours, static_cast<float>(temperature), l2};
  Tensor out = torch::stable::empty(distances.sizes(), ScalarType::Float);
  if (out.numel() == 0) return out;
  const Tensor rows = torch::stable::contiguous(distances);
  casvit::token_weights(casvit::active_kernels(), r,
                        static_cast<const float*>(rows.const_data_ptr()), distances.size(0),
                        distances.size(1), static_cast<float*>(out.mutable_data_ptr()),
                        thread_pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(casvit_kernels, CPU, m) {
  m.impl("cpu_cluster_tokens", TORCH_BOX(&cluster_tokens));
  m.impl("cpu_reconstruct_tokens", TORCH_BOX(&reconstruct_tokens));
  m.impl("cpu_token_weights", TORCH_BOX(&token_weights));
}
