// The table of the kernels of whole networks for the instruction set of the unit.
#pragma once

#include "cpu/network/linear.h"
#include "cpu/network/maps.h"
#include "cpu/network/stem.h"

namespace casvit {
namespace CASVIT_ISA {

constexpr NetworkKernels NETWORK = {
    network_words,        network_k_steps, network_pack,           network_linear,
    network_stem_linear,  network_operand, network_neighbourhoods, network_depthwise_gelu,
    network_stem_row,     network_combine, network_mean,           network_scaled,
    network_multiply_adds};

}  // namespace CASVIT_ISA
}  // namespace casvit
