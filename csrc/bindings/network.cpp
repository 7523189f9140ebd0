// The operators of a whole network on CPU tensors; their schemas are in
// casvit_kernels/ops/network/schema.py. No arithmetic here.
#include <stdexcept>
#include <vector>

#include "bindings/tensors.h"
#include "cpu/dispatch.h"
#include "cpu/network/infer.h"
#include "cpu/network/scratch.h"

namespace {

using namespace casvit::binding;
using torch::headeronly::IntHeaderOnlyArrayRef;

casvit::NetworkPlan plan_of(IntHeaderOnlyArrayRef plan) {
  try {
    return casvit::read_plan(plan.data(), static_cast<int64_t>(plan.size()));
  } catch (const std::invalid_argument& error) { STD_TORCH_CHECK(false, error.what()); }
}

casvit::Precision precision_of(int64_t precision) {
  STD_TORCH_CHECK(precision == 0 || precision == 1, "precision: expected 0 or 1, got ", precision);
  const casvit::Precision p = static_cast<casvit::Precision>(precision);
  STD_TORCH_CHECK(casvit::active_kernels().network.words(p) > 0,
                  "precision: ", casvit::active_kernels().name, " has no bf16");
  return p;
}

Tensor pack(const Tensor& weights, IntHeaderOnlyArrayRef plan, int64_t precision) {
  STD_TORCH_CHECK(
      weights.is_cpu() && weights.scalar_type() == ScalarType::Float && weights.is_contiguous(),
      "weights: expected contiguous float32 on the CPU");
  const casvit::NetworkPlan p = plan_of(plan);
  STD_TORCH_CHECK(weights.numel() == casvit::network_weights(p), "weights: expected ",
                  casvit::network_weights(p), " for the plan, got ", weights.numel());
  const casvit::Kernels& kernels = casvit::active_kernels();
  const casvit::Precision which = precision_of(precision);
  const int64_t bytes[] = {casvit::network_packed_bytes(kernels, p, which)};
  Tensor packed = torch::stable::empty({bytes, 1}, ScalarType::Byte);
  casvit::pack_network(kernels, p, which, static_cast<const float*>(weights.const_data_ptr()),
                       packed.mutable_data_ptr());
  return packed;
}

void check_size(const Tensor& t, size_t i, const char* name, int64_t expected) {
  STD_TORCH_CHECK(t.sizes()[i] == expected, "outs: expected ", expected, " in ", name, ", got ",
                  t.sizes()[i]);
}

void infer(const Tensor& x, const Tensor& packed, IntHeaderOnlyArrayRef plan, int64_t precision,
           int64_t threads, const Tensor& scratch, const std::vector<Tensor>& outs) {
  const casvit::NetworkPlan p = plan_of(plan);
  const casvit::Kernels& kernels = casvit::active_kernels();
  const casvit::Precision which = precision_of(precision);
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "x: expected 4 dimensions (B, C, H, W) on the CPU");
  const bool bytes = x.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || (bytes && p.normalized),
                  "x: expected float32", p.normalized ? " or uint8" : "");
  const int64_t B = x.size(0), H = x.size(2), W = x.size(3);
  STD_TORCH_CHECK(x.size(1) == p.in_chans, "x: expected ", p.in_chans, " channels, got ",
                  x.size(1));
  STD_TORCH_CHECK(H > 0 && W > 0 && H <= casvit::MOST_IMAGE_SIDE && W <= casvit::MOST_IMAGE_SIDE,
                  "x: expected 1 to ", casvit::MOST_IMAGE_SIDE, " rows and columns, got ", H,
                  " and ", W);
  STD_TORCH_CHECK(threads > 0, "threads: expected at least 1, got ", threads);
  STD_TORCH_CHECK(packed.is_cpu() &&
                      casvit::made_for(kernels, p, which, packed.const_data_ptr(), packed.numel()),
                  "packed: expected weights packed for the plan, on this machine");
  std::vector<casvit::Output> outputs;
  const auto expected = [&](const Tensor& t, int64_t C, int64_t h, int64_t w) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float,
                    "outs: expected float32 on the CPU");
    STD_TORCH_CHECK(t.dim() == (h > 0 ? 4 : 2), "outs: expected ", h > 0 ? 4 : 2, " dimensions");
    check_size(t, 0, "dimension 0", B);
    check_size(t, 1, "dimension 1", C);
    if (h > 0) {
      check_size(t, 2, "dimension 2", h);
      check_size(t, 3, "dimension 3", w);
    }
    const bool last = !t.is_contiguous();
    if (last)  // dense, channels innermost
      STD_TORCH_CHECK(h > 0 && t.strides()[1] == 1 && t.strides()[3] == C &&
                          t.strides()[2] == w * C && t.strides()[0] == h * w * C,
                      "outs: expected dense ones, channels first or last");
    outputs.push_back({t.mutable_data_ptr(), casvit::DType::F32, last});
  };
  const size_t count = static_cast<size_t>(p.head != casvit::NetworkPlan::NOTHING);
  size_t maps = 0;
  for (int64_t s = 0; s < p.stages; ++s) maps += p.stage[s].returned;
  STD_TORCH_CHECK(outs.size() == maps + count, "outs: expected ", maps + count, ", got ",
                  outs.size());
  int64_t h = (H + 1) / 2, w = (W + 1) / 2;
  for (int64_t s = 0; s < p.stages; ++s) {
    h = (h + 1) / 2, w = (w + 1) / 2;
    if (p.stage[s].returned) expected(outs[outputs.size()], p.stage[s].C, h, w);
  }
  if (p.head != casvit::NetworkPlan::NOTHING) {
    const bool map = p.head == casvit::NetworkPlan::MAP, logits = p.classes > 0;
    expected(outs[outputs.size()], logits ? p.classes : p.stage[p.stages - 1].C, map ? h : 0, w);
  }
  if (B == 0) return;
  STD_TORCH_CHECK(
      scratch.is_cpu() && scratch.scalar_type() == ScalarType::Byte && scratch.is_contiguous() &&
          scratch.numel() >= casvit::network_scratch_bytes(kernels, p, which, B, H, W, threads),
      "scratch: expected at least ",
      casvit::network_scratch_bytes(kernels, p, which, B, H, W, threads), " bytes");
  const auto strides = x.strides();
  casvit::ThreadPool pool = thread_pool();
  pool.threads = threads;
  casvit::infer_network(
      kernels, p, which, packed.const_data_ptr(),
      {x.const_data_ptr(), bytes, B, H, W, strides[0], strides[1], strides[2], strides[3]},
      outputs.data(), scratch.mutable_data_ptr(), pool);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(casvit_kernels, CPU, m) {
  m.impl("network_pack", TORCH_BOX(&pack));
  m.impl("network_infer", TORCH_BOX(&infer));
}

// Plain C functions, called from Python through ctypes.
#define CASVIT_EXPORT __attribute__((visibility("default")))
extern "C" {

// Whether the instruction set in use has a precision: 0 float32, 1 bf16.
CASVIT_EXPORT int64_t casvit_network_precision(int64_t precision) {
  if (precision < 0 || precision > 1) return 0;
  return casvit::active_kernels().network.words(static_cast<casvit::Precision>(precision)) > 0;
}

// Bytes of scratch of a call; -1 where the integers are no plan, or the numbers none of a call.
CASVIT_EXPORT int64_t casvit_network_scratch(const int64_t* plan, int64_t length, int64_t batch,
                                             int64_t H, int64_t W, int64_t precision,
                                             int64_t threads) {
  if (!casvit_network_precision(precision) || batch < 0 || H < 1 || W < 1 || threads < 1) return -1;
  try {
    return casvit::network_scratch_bytes(casvit::active_kernels(), casvit::read_plan(plan, length),
                                         static_cast<casvit::Precision>(precision), batch, H, W,
                                         threads);
  } catch (const std::invalid_argument&) { return -1; }
}

// Rounds of independent multiply-adds of the instruction set in use, on the calling thread; how
// many they were, 0 where it has not this precision.
CASVIT_EXPORT int64_t casvit_cpu_fma_loop(int64_t precision, int64_t rounds) {
  if (!casvit_network_precision(precision)) return 0;
  return casvit::active_kernels().network.multiply_adds(static_cast<casvit::Precision>(precision),
                                                        rounds);
}
}
