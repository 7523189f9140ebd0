"""The gates of `oper_q` and `oper_k`: a sigmoid for each pixel, then one for each channel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.mixer.reference import AdditiveTokenMixer
from . import network


class StageGates(NamedTuple):
    """The gates of the last mixer of one stage."""

    mixer: str  # its name in the network
    q: Tensor  # (B, H, W), in (0, 1)
    k: Tensor  # (B, H, W)


def spatial_gates(mixer: AdditiveTokenMixer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps ``(B, H, W)`` for a mixer's input ``(B, C, H, W)``; arXiv 2408.03703, 3.2."""
    q, k, _ = mixer.qkv(x).chunk(3, dim=1)
    return _map(mixer.oper_q[0], q), _map(mixer.oper_k[0], k)


def channel_gates(mixer: AdditiveTokenMixer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both vectors ``(B, C)`` for a mixer's input ``(B, C, H, W)``; arXiv 2408.03703, 3.2.

    They multiply the channels of what the spatial gates left.
    """
    q, k, _ = mixer.qkv(x).chunk(3, dim=1)
    return _vector(mixer.oper_q, q), _vector(mixer.oper_k, k)


def _map(operation: nn.Module, z: Tensor) -> Tensor:
    # The block of a spatial operation ends at its sigmoid; the operation then multiplies by it.
    block: Any = operation.block
    gate: Tensor = block(z)
    return gate[:, 0]


def _vector(operation: nn.Sequential, z: Tensor) -> Tensor:
    block: Any = operation[1].block
    gate: Tensor = block(operation[0](z))
    return gate[:, :, 0, 0]


@torch.no_grad()
def of_stages(model: nn.Module, inputs: dict[str, Tensor]) -> list[StageGates]:
    """The gates of the last mixer of every stage, for the mixers' `inputs`."""
    found = network.mixers(model)
    return [
        StageGates(names[-1], *spatial_gates(found[names[-1]], inputs[names[-1]]))
        for names in network.stages(list(found))
    ]
