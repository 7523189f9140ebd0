// The packed weights of a whole network: one walk over them says where each array lies, for packing
// and for reading alike.
#pragma once

#include "cpu/kernels.h"
#include "cpu/packed_layout.h"

namespace casvit {

struct NetworkHeader {
  int64_t magic, bytes, precision;
  char isa[40];
};

// Walks the arrays in the order in which they are read; every call returns the next.
class NetworkWeights {
 public:
  struct Stem {
    const float* padding;  // [in_chans]
    StemWeights first;
    Linear second;
  };
  struct Block {
    Linear local_in;
    DepthwiseWeights local;
    Linear local_out, qkv;
    GateView gate[2];
    DepthwiseWeights dwc, proj;
    Linear fc1, fc2;
  };
  struct Affine {
    const float *scale, *shift;  // [padded]
  };

  // base: null to count only.
  NetworkWeights(const Kernels& k, Precision precision, const void* base)
      : k_(&k),
        precision_(precision),
        base_(static_cast<char*>(const_cast<void*>(base))),
        at_(aligned(sizeof(NetworkHeader))) {}

  Stem stem(const NetworkPlan& p) {
    Stem s{};
    s.padding = take(p.in_chans);
    s.first = {take(9 * p.in_chans * p.stem_mid), take(p.stem_mid), p.stem_mid};
    s.second = linear(p.stage[0].C, p.stem_mid, 9);
    return s;
  }
  Linear embedding(const NetworkPlan& p, int64_t stage) {
    return linear(p.stage[stage].C, p.stage[stage - 1].C, 9);
  }
  Block block(int64_t C, int64_t hidden) {
    Block b{};
    b.local_in = linear(C, C);
    b.local = depthwise(C);
    b.local_out = linear(C, C);
    b.qkv = linear(3 * padded(C), C);
    for (GateView& g : b.gate) {
      const DepthwiseWeights d = depthwise(C);
      g.depthwise = d.taps;
      g.depthwise_bias = d.bias;
      g.spatial = take(padded(C));
      g.channel = take(C * padded(C));
    }
    b.dwc = depthwise(C);
    b.proj = depthwise(C);
    b.fc1 = linear(hidden, C);
    b.fc2 = linear(C, hidden);
    return b;
  }
  Affine affine(int64_t C) { return {take(padded(C)), take(padded(C))}; }
  // The head computes in float32 in either precision: it is read once an image.
  Linear head(const NetworkPlan& p) {
    Linear l = linear(p.classes, p.stage[p.stages - 1].C, 1, Precision::F32);
    l.chain = 32;  // a user looks at these sums
    return l;
  }

  // What comes next, to be prefetched.
  const float* next() const { return reinterpret_cast<const float*>(base_ + at_); }
  // One line more than there is: prefetches go past the end.
  int64_t bytes() const { return at_ + 64; }
  int64_t padded(int64_t C) const { return divide_up(C, k_->lanes) * k_->lanes; }

 private:
  float* take(int64_t count) {
    float* here = reinterpret_cast<float*>(base_ + at_);
    at_ = aligned(at_ + count * 4);
    return here;
  }
  DepthwiseWeights depthwise(int64_t C) { return {take(9 * padded(C)), take(padded(C))}; }
  Linear linear(int64_t outputs, int64_t K, int64_t taps = 1) {
    return linear(outputs, K, taps, precision_);
  }
  Linear linear(int64_t outputs, int64_t K, int64_t taps, Precision precision) {
    Linear l{};
    l.blocks = divide_up(outputs, k_->lanes);
    l.k_steps = taps * k_->network.k_steps(K, precision);
    l.group = l.blocks % 3 == 0 ? 3 : 2;
    // The rounding errors of one long chain add up to a decimal digit.
    l.chain = taps > 1 ? 64 : 128;
    l.weights = take(l.blocks * k_->lanes * l.k_steps);
    l.bias = take(l.blocks * k_->lanes);
    return l;
  }

  const Kernels* k_;
  Precision precision_;
  char* base_;
  int64_t at_;
};

int64_t network_packed_bytes(const Kernels&, const NetworkPlan&, Precision);
// Floats of the flat weights that `pack_network` reads.
int64_t network_weights(const NetworkPlan&);
void pack_network(const Kernels&, const NetworkPlan&, Precision, const float* weights,
                  void* packed);
// Whether they were packed for this plan by these kernels.
bool made_for(const Kernels&, const NetworkPlan&, Precision, const void* packed, int64_t bytes);

}  // namespace casvit
