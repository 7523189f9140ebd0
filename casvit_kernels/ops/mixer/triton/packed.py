"""A mixer's weights as the kernels read them. Imports no triton: compilers follow what is here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import MixerWeights


class Packed(NamedTuple):
    """A mixer's weights for inference."""

    qkv_weight: Tensor  # (3C, C), of the dtype computed in
    qkv_bias: Tensor | None  # (3C,)
    vectors: Tensor  # see `vectors`
    statistics: Tensor  # (2, 2, C) float32, the running ones; the last of vectors


def pack(w: MixerWeights, dtype: torch.dtype) -> Packed:
    """One launch on a GPU where qkv's weight has the dtype: a captured graph replays it in each call."""
    moments = (w.q.norm_mean, w.q.norm_var, w.k.norm_mean, w.k.norm_var)
    found = vectors(w, *[t for t in moments if t is not None])
    statistics = found[-4 * w.dwc_bias.shape[0] :].view(2, 2, -1)
    return Packed(*qkv_of(w, dtype), found, statistics)


def qkv_of(w: MixerWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return w.qkv_weight.flatten(1).to(dtype), None if w.qkv_bias is None else w.qkv_bias.to(dtype)


def vectors(w: MixerWeights, *more: Tensor) -> Tensor:
    """All weights but those of qkv as one float32 vector, as the kernels read them.

    For q and k: depthwise (C, 9), its bias, BatchNorm's weight and bias, to the spatial gate (C each):
    13C; for dwc and proj: (C, 9) and bias: 10C each; 46C in all. Then the channel gates' (2, C, C).
    more: (C,) each, what shall follow; it begins at a multiple of 16 bytes.
    """
    c = w.dwc_bias.shape[0]
    pieces: list[Tensor] = []
    for gate in (w.q, w.k):
        pieces += gate.depthwise_weight, gate.depthwise_bias
        pieces.append(w.dwc_bias.new_ones(c) if gate.norm_weight is None else gate.norm_weight)
        pieces.append(w.dwc_bias.new_zeros(c) if gate.norm_bias is None else gate.norm_bias)
        pieces.append(gate.spatial_weight)
    pieces += w.dwc_weight, w.dwc_bias, w.proj_weight, w.proj_bias
    pieces += w.q.channel_weight, w.k.channel_weight, *more
    size = (46 + 2 * c + len(more)) * c
    packed = torch.empty(size, dtype=torch.float32, device=w.dwc_bias.device)
    torch.cat([p.reshape(-1) for p in pieces], out=packed)
    return packed
