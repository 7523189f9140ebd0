#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/network/weights.h"

namespace casvit {
namespace {

constexpr int64_t MAGIC = 0x54454e5456534143;  // "CASVTNET"

NetworkHeader header_of(const Kernels& k, const NetworkPlan& p, Precision precision) {
  NetworkHeader h{};
  h.magic = MAGIC;
  h.bytes = network_packed_bytes(k, p, precision);
  h.precision = static_cast<int64_t>(precision);
  std::memcpy(h.isa, k.name, std::min(std::strlen(k.name), sizeof h.isa));
  return h;
}

// Takes the flat weights in order and fills arrays of the packed ones.
class Filler {
 public:
  Filler(const Kernels& k, Precision precision, const float* from)
      : k_(k), precision_(precision), from_(from) {}

  const float* take(int64_t count) {
    const float* here = from_;
    from_ += count;
    return here;
  }
  void copy(const float* to, int64_t count) { copy(take(count), to, count); }
  void copy(const float* from, const float* to, int64_t count) {
    std::memcpy(const_cast<float*>(to), from, sizeof(float) * static_cast<size_t>(count));
  }
  void linear(const Linear& l, int64_t outputs, int64_t K) { linear(l, outputs, K, precision_); }
  void linear(const Linear& l, int64_t outputs, int64_t K, Precision precision) {
    const float* matrix = take(outputs * K);
    pack(l, matrix, outputs, K, K, precision);
    copy(l.bias, outputs);
  }
  // [outputs][K][3][3], to be read tap by tap.
  void convolution(const Linear& l, int64_t outputs, int64_t K) {
    const float* from = take(outputs * K * 9);
    std::vector<float> matrix(static_cast<size_t>(outputs * K * 9));
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t c = 0; c < K; ++c)
        for (int64_t t = 0; t < 9; ++t)
          matrix[static_cast<size_t>((o * 9 + t) * K + c)] = from[(o * K + c) * 9 + t];
    pack(l, matrix.data(), outputs, 9 * K, K, precision_);
    copy(l.bias, outputs);
  }
  // Each of q, k, v begins with a block of its own.
  void qkv(const Linear& l, int64_t C) {
    const int64_t padded = l.blocks * k_.lanes / 3;
    std::vector<float> matrix(static_cast<size_t>(3 * padded * C));
    const float* from = take(3 * C * C);
    for (int64_t which = 0; which < 3; ++which)
      copy(from + which * C * C, matrix.data() + which * padded * C, C * C);
    pack(l, matrix.data(), 3 * padded, C, C, precision_);
    for (int64_t which = 0; which < 3; ++which) copy(l.bias + which * padded, C);
  }
  void depthwise(const DepthwiseWeights& d, int64_t C) {
    const float* from = take(9 * C);
    float* taps = const_cast<float*>(d.taps);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t t = 0; t < 9; ++t)
        taps[(c / k_.lanes * 9 + t) * k_.lanes + c % k_.lanes] = from[c * 9 + t];
    copy(d.bias, C);
  }
  void gate(const GateView& g, int64_t C) {
    depthwise({g.depthwise, g.depthwise_bias}, C);
    copy(g.spatial, C);
    const float* channel = take(C * C);
    for (int64_t block = 0; block < divide_up(C, k_.lanes); ++block)
      k_.pack_channel_gate(channel, C, block, const_cast<float*>(g.channel));
  }

 private:
  void pack(const Linear& l, const float* matrix, int64_t outputs, int64_t K, int64_t segment,
            Precision precision) {
    for (int64_t block = 0; block < l.blocks; block += l.group) {
      const int64_t output = block * k_.lanes;
      k_.network.pack(matrix + output * K, outputs - output, K, segment, precision,
                      std::min(l.group, l.blocks - block),
                      const_cast<float*>(l.weights) + output * l.k_steps);
    }
  }

  const Kernels& k_;
  Precision precision_;
  const float* from_;
};

}  // namespace

int64_t network_packed_bytes(const Kernels& k, const NetworkPlan& p, Precision precision) {
  NetworkWeights w(k, precision, nullptr);
  w.stem(p);
  for (int64_t s = 0; s < p.stages; ++s) {
    if (s > 0) w.embedding(p, s);
    for (int64_t i = 0; i < p.stage[s].depth; ++i) w.block(p.stage[s].C, p.stage[s].hidden[i]);
    if (p.stage[s].returned) w.affine(p.stage[s].C);
  }
  if (p.head == NetworkPlan::LOGITS) w.head(p);
  else if (p.head != NetworkPlan::NOTHING) w.affine(p.stage[p.stages - 1].C);
  return w.bytes();
}

int64_t network_weights(const NetworkPlan& p) {
  int64_t n = p.normalized ? p.in_chans : 0;
  n += p.stem_mid * (9 * p.in_chans + 1) + p.stage[0].C * (9 * p.stem_mid + 1);
  for (int64_t s = 0; s < p.stages; ++s) {
    const int64_t C = p.stage[s].C;
    if (s > 0) n += C * (9 * p.stage[s - 1].C + 1);
    for (int64_t i = 0; i < p.stage[s].depth; ++i) {
      const int64_t hidden = p.stage[s].hidden[i];
      n += 5 * C * C + 5 * C;            // local integration's and qkv
      n += 5 * 10 * C;                   // depthwise
      n += 2 * (C + C * C);              // gates
      n += 2 * C * hidden + hidden + C;  // Mlp
    }
    if (p.stage[s].returned) n += 2 * C;
  }
  const int64_t last = p.stage[p.stages - 1].C;
  if (p.head == NetworkPlan::LOGITS) n += p.classes * (last + 1);
  else if (p.head != NetworkPlan::NOTHING) n += 2 * last;
  return n;
}

void pack_network(const Kernels& k, const NetworkPlan& p, Precision precision, const float* weights,
                  void* packed) {
  const NetworkHeader h = header_of(k, p, precision);
  std::memset(packed, 0, static_cast<size_t>(h.bytes));
  std::memcpy(packed, &h, sizeof h);
  NetworkWeights w(k, precision, packed);
  Filler fill(k, precision, weights);
  const NetworkWeights::Stem stem = w.stem(p);
  if (p.normalized) fill.copy(stem.padding, p.in_chans);
  const float* first = fill.take(p.stem_mid * p.in_chans * 9);
  for (int64_t o = 0; o < p.stem_mid; ++o)
    for (int64_t i = 0; i < p.in_chans * 9; ++i)
      const_cast<float*>(stem.first.weights)[i * p.stem_mid + o] = first[o * p.in_chans * 9 + i];
  fill.copy(stem.first.bias, p.stem_mid);
  fill.convolution(stem.second, p.stage[0].C, p.stem_mid);
  auto affine = [&](int64_t C) {
    const NetworkWeights::Affine a = w.affine(C);
    fill.copy(a.scale, C);
    fill.copy(a.shift, C);
  };
  for (int64_t s = 0; s < p.stages; ++s) {
    const int64_t C = p.stage[s].C;
    if (s > 0) fill.convolution(w.embedding(p, s), C, p.stage[s - 1].C);
    for (int64_t i = 0; i < p.stage[s].depth; ++i) {
      const int64_t hidden = p.stage[s].hidden[i];
      const NetworkWeights::Block b = w.block(C, hidden);
      fill.linear(b.local_in, C, C);
      fill.depthwise(b.local, C);
      fill.linear(b.local_out, C, C);
      fill.qkv(b.qkv, C);
      for (const GateView& g : b.gate) fill.gate(g, C);
      fill.depthwise(b.dwc, C);
      fill.depthwise(b.proj, C);
      fill.linear(b.fc1, hidden, C);
      fill.linear(b.fc2, C, hidden);
    }
    if (p.stage[s].returned) affine(C);
  }
  const int64_t C = p.stage[p.stages - 1].C;
  if (p.head == NetworkPlan::LOGITS) fill.linear(w.head(p), p.classes, C, Precision::F32);
  else if (p.head != NetworkPlan::NOTHING) affine(C);
}

bool made_for(const Kernels& k, const NetworkPlan& p, Precision precision, const void* packed,
              int64_t bytes) {
  const NetworkHeader h = header_of(k, p, precision);
  return bytes == h.bytes && std::memcmp(packed, &h, sizeof h) == 0;
}

}  // namespace casvit
