"""Multiply-adds of a model, counted."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..surgery import unfuse


def macs(model: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of the convolutions and linear layers of one call.

    Bias, norms, activations, means and products of maps are not counted: what a matrix unit or a FMA
    unit could not do more of. The model is copied without its weights' values; nothing is computed.

    Args:
        model: its convolutions are `Conv2d`, its products `Linear`; what `fuse` or `fuse_network` made
            is counted as the plain model that it equals.
        shape: of the input, ``(B, C, H, W)``.

    Raises:
        ValueError: the model has neither.
    """
    with torch.inference_mode(False):
        plain = copy.deepcopy(model).to("meta").eval()
        restored = unfuse(plain)
        if isinstance(restored, nn.Module):  # of a network in one call: its mixers may be fused yet
            plain = restored
            unfuse(plain)
        counted: list[int] = []

        def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            assert isinstance(module, nn.Conv2d | nn.Linear)
            # Weights are (out, in of a group, ...): each output takes as many terms as the rest holds.
            counted.append(out.numel() * module.weight[0].numel())

        for module in plain.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        with torch.no_grad():
            plain(torch.empty(tuple(shape), device="meta"))
    if not counted:
        raise ValueError("model: expected convolutions or linear layers, got none")
    return sum(counted)
