#include "cpu/packed_layout.h"

#include <cstring>

#include "cpu/k_scale.h"
#include "cpu/scratch.h"

namespace casvit {
namespace {

thread_local Buffer matrix_buffer;

// Hands out offsets in bytes, one array behind the other.
class Offsets {
 public:
  explicit Offsets(int64_t begin) : next_(begin) {}
  int64_t take(int64_t bytes) {
    const int64_t begin = next_;
    next_ = aligned(next_ + bytes);
    return begin;
  }
  int64_t end() const { return next_; }

 private:
  int64_t next_;
};

}  // namespace

QkvLayout::QkvLayout(const Kernels& k, int64_t C, Precision precision, int64_t begin, bool kept) {
  const int64_t blocks = divide_up(C, k.lanes);
  Offsets next(begin);
  weight = next.take(k.qkv.weight_bytes(C, blocks, precision));
  k_scale = next.take(k.qkv.scales_k ? padded_k_scales(C) * 4 : 0);
  matrix = next.take(k.qkv.scales_k && kept ? 3 * blocks * k.lanes * C * 4 : 0);
  bias = next.take(3 * blocks * k.lanes * 4);
  end = next.end();
}

MixingLayout::MixingLayout(const Kernels& k, int64_t C, int64_t begin) {
  const int64_t padded = divide_up(C, k.lanes) * k.lanes;
  Offsets next(begin);
  for (Gate& g : gate) {
    g.depthwise = next.take(9 * padded * 4);
    g.depthwise_bias = next.take(padded * 4);
    g.spatial = next.take(padded * 4);
    g.channel = next.take(C * padded * 4);
  }
  dwc = next.take(9 * padded * 4);
  dwc_bias = next.take(padded * 4);
  proj = next.take(9 * padded * 4);
  proj_bias = next.take(padded * 4);
  end = next.end();
}

// Packed weights are block after block, so threads may pack three blocks each.
const float* fill_qkv(const Kernels& k, int64_t C, const Source& weight, const Source& bias,
                      Precision precision, const QkvLayout& layout, void* base,
                      const ThreadPool& pool) {
  const int64_t blocks = (C + k.lanes - 1) / k.lanes, padded = blocks * k.lanes;
  const bool as_it_is = C == padded && is_dense(weight, C);
  float* matrix = as_it_is ? nullptr : static_cast<float*>(matrix_buffer.get(3 * padded * C * 4));
  const float* from = as_it_is ? static_cast<const float*>(weight.data) : matrix;
  parallel_for(pool, blocks, [&](int64_t i) {
    for (int64_t row = 3 * i * k.lanes; row < 3 * (i + 1) * k.lanes; ++row) {
      const int64_t t = row / padded, o = row % padded;
      if (!as_it_is) {
        if (o < C) copy_row(weight, t * C + o, C, matrix + row * C);
        else std::memset(matrix + row * C, 0, sizeof(float) * static_cast<size_t>(C));
      }
      if (o < C && bias.data) floats(base, layout.bias)[row] = at(bias, t * C + o);
    }
  });
  float* k_scale = k.qkv.scales_k ? floats(base, layout.k_scale) : nullptr;
  if (k_scale)
    parallel_for(pool, padded_k_scales(C) / 64, [&](int64_t i) {
      column_maxima(from, 3 * padded, C, 64 * i, 64 * (i + 1), k_scale);
    });
  parallel_for(pool, blocks, [&](int64_t i) {
    k.qkv.pack_weights(
        from + 3 * i * k.lanes * C, C, 1, precision, k_scale,
        static_cast<char*>(base) + layout.weight + i * k.qkv.weight_bytes(C, 1, precision));
  });
  return from;
}

void fill_combine(const Kernels& k, const Sources& s, const MixingLayout& layout, void* base) {
  pack_depthwise(s.dwc_weight, s.dwc_bias, s.C, k.lanes, floats(base, layout.dwc),
                 floats(base, layout.dwc_bias), unscaled, unshifted);
  pack_depthwise(s.proj_weight, s.proj_bias, s.C, k.lanes, floats(base, layout.proj),
                 floats(base, layout.proj_bias), unscaled, unshifted);
}
void fill_mixing(const Kernels& k, const Sources& s, const MixingLayout& layout, void* base,
                 const ThreadPool& pool) {
  const int64_t C = s.C;
  for (int i = 0; i < 2; ++i) {
    const GateSources& g = s.gate[i];
    pack_depthwise(
        g.depthwise_weight, g.depthwise_bias, C, k.lanes, floats(base, layout.gate[i].depthwise),
        floats(base, layout.gate[i].depthwise_bias),
        [&](int64_t c) { return batch_norm_scale(g, c); },
        [&](int64_t c, double scale) { return beta(g, c) - at(g.norm_mean, c) * scale; });
    copy_row(g.spatial_weight, 0, C, floats(base, layout.gate[i].spatial));
    const bool dense = is_dense(g.channel_weight, C);
    const float* matrix =
        dense_matrix(g.channel_weight, C, C,
                     dense ? nullptr : static_cast<float*>(matrix_buffer.get(C * C * 4)));
    parallel_for(pool, divide_up(C, k.lanes), [&](int64_t block) {
      k.pack_channel_gate(matrix, C, block, floats(base, layout.gate[i].channel));
    });
  }
  fill_combine(k, s, layout, base);
}

WeightsView view_mixing(const MixingLayout& layout, const void* packed) {
  void* base = const_cast<void*>(packed);
  WeightsView v{};
  for (int i = 0; i < 2; ++i)
    v.gate[i] = {floats(base, layout.gate[i].depthwise),
                 floats(base, layout.gate[i].depthwise_bias), floats(base, layout.gate[i].spatial),
                 floats(base, layout.gate[i].channel)};
  v.dwc = floats(base, layout.dwc);
  v.dwc_bias = floats(base, layout.dwc_bias);
  v.proj = floats(base, layout.proj);
  v.proj_bias = floats(base, layout.proj_bias);
  return v;
}
void view_qkv(const QkvLayout& layout, const void* packed, WeightsView& v) {
  v.qkv_weight = static_cast<const unsigned char*>(packed) + layout.weight;
  v.k_scale = floats(const_cast<void*>(packed), layout.k_scale);
  v.matrix = floats(const_cast<void*>(packed), layout.matrix);
  v.qkv_bias = floats(const_cast<void*>(packed), layout.bias);
}

}  // namespace casvit
