// Reconstruction of a token from the refined centres of those that were nearest to it.
#pragma once

#include <cmath>

#include "cpu/tokens/affinities.h"

namespace casvit {
namespace CASVIT_ISA {

CASVIT_INLINE int32_t weight_bits(float weight) {
  int32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits;
}

// The bits of the `wanted`-th largest of `count` weights in [0, 1], which are ordered as they are.
// Bisection: each step is one pass over a row in the L1 cache, and ten or so find it.
CASVIT_INLINE int32_t least_wanted(const float* weights, int64_t count, int64_t wanted) {
  const int32_t* bits = reinterpret_cast<const int32_t*>(weights);
  int32_t low = 0, high = weight_bits(1.0f) + 1;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    int32_t found = 0;
    for (int64_t i = 0; i < count; ++i) found += bits[i] >= middle;
    if (found == wanted) return middle;
    if (found > wanted) low = middle;
    else high = middle;
  }
  return low;
}

// The centres that count for a token and their weights, divided by their norm. distances: squared,
// [cells]. Returns how many there are; none where a distance is NaN.
static int64_t nearest_centres(const Reconstruction& r, const float* distances, float* weights,
                               WeightedCentre* found) {
  const int64_t K = r.cells;
  std::memcpy(weights, distances, static_cast<size_t>(K) * 4);
  const float sum = weights_of_distances(weights, K, r.temperature);
  if (sum != sum) return 0;
  const int32_t least = r.neighbours < K ? least_wanted(weights, K, r.neighbours) : 0;
  int64_t count = 0;
  double norm = 0.0;
  for (int64_t i = 0; i < K; ++i)
    if (weight_bits(weights[i]) >= least && weights[i] > 0.0f) {
      const double w = static_cast<double>(weights[i]);
      norm += r.l2 ? w * w : w;
      found[count++] = {i, weights[i]};
    }
  const double divisor = r.l2 ? std::sqrt(norm) : norm;
  for (int64_t i = 0; i < count; ++i)
    found[i].weight = static_cast<float>(static_cast<double>(found[i].weight) / divisor);
  return count;
}

// V vectors of a token, the last of which has `last` channels.
template <int V, class T>
CASVIT_INLINE void combine_centres(const T* centres, int64_t channels, const WeightedCentre* found,
                                   int64_t count, int last, T* to) {
  Vec sums[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sums[v] = zero();
  for (int64_t i = 0; i < count; ++i) {
    const T* centre = centres + found[i].index * channels;
    const Vec weight = splat(found[i].weight);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec value =
          v + 1 < V ? load_as_float(centre + v * VL) : load_first_as_float(centre + v * VL, last);
      sums[v] = fma(weight, value, sums[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store_first(to + v * VL, sums[v], v + 1 < V ? VL : last);
}

template <class T>
CASVIT_INLINE void combine_centres(const Reconstruction& r, const T* centres,
                                   const WeightedCentre* found, int64_t count, T* to) {
  constexpr int V = VL == 16 ? 8 : 4;
  int64_t c = 0;
  for (; c + V * VL <= r.channels; c += V * VL)
    combine_centres<V>(centres + c, r.channels, found, count, VL, to + c);
  for (; c < r.channels; c += VL) {
    const int64_t left = r.channels - c;
    combine_centres<1>(centres + c, r.channels, found, count,
                       static_cast<int>(left < VL ? left : VL), to + c);
  }
}

// Tokens [begin, end) of one image. y: [cells][channels]; distances: [tokens][cells].
static void reconstruct_tokens(const Reconstruction& r, const void* y, const float* distances,
                               int64_t begin, int64_t end, void* out, void* temp) {
  float* weights = static_cast<float*>(temp);
  WeightedCentre* found = reinterpret_cast<WeightedCentre*>(weights + (r.cells + 15) / 16 * 16);
  const auto tokens = [&](auto* to, const auto* centres) {
    for (int64_t t = begin; t < end; ++t) {
      int64_t count = nearest_centres(r, distances + t * r.cells, weights, found);
      if (count == 0) found[count++] = {0, __builtin_nanf("")};
      combine_centres(r, centres, found, count, to + t * r.channels);
    }
  };
  switch (r.dtype) {
    case DType::F32: return tokens(static_cast<float*>(out), static_cast<const float*>(y));
    case DType::BF16: return tokens(static_cast<Bf16*>(out), static_cast<const Bf16*>(y));
    case DType::F16: return tokens(static_cast<F16*>(out), static_cast<const F16*>(y));
  }
}

// Their weights for all centres, [tokens][cells], as `reconstruct_tokens` takes them.
static void token_weights(const Reconstruction& r, const float* distances, int64_t begin,
                          int64_t end, float* out, void* temp) {
  float* weights = static_cast<float*>(temp);
  WeightedCentre* found = reinterpret_cast<WeightedCentre*>(weights + (r.cells + 15) / 16 * 16);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t count = nearest_centres(r, distances + t * r.cells, weights, found);
    float* to = out + t * r.cells;
    const float others = count == 0 ? __builtin_nanf("") : 0.0f;
    for (int64_t k = 0; k < r.cells; ++k) to[k] = others;
    for (int64_t i = 0; i < count; ++i) to[found[i].index] = found[i].weight;
  }
}

}  // namespace CASVIT_ISA
}  // namespace casvit
