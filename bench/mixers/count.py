"""What a mixer costs, counted: multiply-adds and parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def macs(mixer: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of one call: convolutions, linear layers, and products of tokens with tokens.

    As `casvit_kernels.benchmark.macs`, which counts modules, but matrix products within a forward count,
    too. Norms, activations, means and elementwise products do not. Nothing is computed: the mixer is
    copied without its weights' values.

    Args:
        mixer: plain; its products are matrix products or `scaled_dot_product_attention`.
        shape: of the input, ``(B, C, H, W)``.
    """
    empty = copy.deepcopy(mixer).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        empty(torch.empty(tuple(shape), device="meta"))
    return int(counter.get_total_flops()) // 2


def parameters(mixer: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in mixer.parameters())
