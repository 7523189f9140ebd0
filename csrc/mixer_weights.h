// The weights of the token mixer: their order and shapes, written once. Everything in C++ that
// depends on the order is made of these lists, and casvit_mixer_weights() tells Python.
//
// X(prefix, field, presence, elements, dimensions): one weight, named prefix##field; with C the
// number of channels, and a presence of Required or Optional.
#pragma once

#define CASVIT_QKV_WEIGHTS(X)             \
  X(, qkv_weight, Required, 3 * C * C, 4) \
  X(, qkv_bias, Optional, 3 * C, 1)

#define CASVIT_GATE_WEIGHTS(X, prefix)            \
  X(prefix, depthwise_weight, Required, 9 * C, 4) \
  X(prefix, depthwise_bias, Required, C, 1)       \
  X(prefix, norm_weight, Optional, C, 1)          \
  X(prefix, norm_bias, Optional, C, 1)            \
  X(prefix, norm_mean, Optional, C, 1)            \
  X(prefix, norm_var, Optional, C, 1)             \
  X(prefix, spatial_weight, Required, C, 4)       \
  X(prefix, channel_weight, Required, (C * C), 4)

#define CASVIT_COMBINE_WEIGHTS(X)      \
  X(, dwc_weight, Required, 9 * C, 4)  \
  X(, dwc_bias, Required, C, 1)        \
  X(, proj_weight, Required, 9 * C, 4) \
  X(, proj_bias, Required, C, 1)

#define CASVIT_MIXER_WEIGHTS(X) \
  CASVIT_QKV_WEIGHTS(X)         \
  CASVIT_GATE_WEIGHTS(X, q_)    \
  CASVIT_GATE_WEIGHTS(X, k_)    \
  CASVIT_COMBINE_WEIGHTS(X)
