// The table of kernels that are written over Vec, for the instruction set of the unit.
#pragma once

#include "cpu/gemm/qkv.h"
#include "cpu/gemm/qkv_backward.h"
#include "cpu/mixer/backward_combine.h"
#include "cpu/mixer/backward_depthwise.h"
#include "cpu/mixer/backward_gates.h"
#include "cpu/mixer/combine.h"
#include "cpu/mixer/gates.h"
#include "cpu/mixer/statistics.h"
#include "cpu/network/kernels.h"
#include "cpu/tokens/affinities.h"
#include "cpu/tokens/means.h"
#include "cpu/tokens/nearest.h"

namespace casvit {
namespace CASVIT_ISA {

static Kernels vector_kernels(const char* name) {
  return {name,
          VL,
          QKV_GEMM,
          spatial_gate,
          channel_gate,
          pack_channel_gate,
          combine,
          moments,
          backward_combine,
          backward_gate,
          backward_depthwise,
          channel_gate_backward,
          QKV_BACKWARD,
          {widen_token, narrow_centre, pool_tokens, token_affinities, weighted_means,
           reconstruct_tokens, token_weights},
          NETWORK};
}

}  // namespace CASVIT_ISA
}  // namespace casvit
