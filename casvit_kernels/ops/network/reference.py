"""A network of a plan and its flat weights in plain PyTorch: the formula, and the oracle of tests.

May import: torch, plan.py.
Source: CAS-ViT, arXiv 2408.03703, section 3.3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import LOGITS, MAP, MAPS, POOLED, Plan


class _Weights:
    """Takes tensors off the front of the flat list."""

    def __init__(self, flat: Tensor) -> None:
        self._left = flat

    def take(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        taken, self._left = self._left[:count], self._left[count:]
        return taken.view(shape)

    def layer(self, outputs: int, inputs: int, side: int = 1) -> tuple[Tensor, Tensor]:
        return self.take(outputs, inputs, side, side), self.take(outputs)


def compute(x: Tensor, weights: Tensor, plan: Plan) -> list[Tensor]:
    """The outputs in the order of `Plan.output_shapes`, in the dtype of the weights.

    Args:
        x: ``(B, C, H, W)`` of a floating dtype; for a normalized plan of values in [0, 1], or uint8.
        weights: ``(plan.weight_count(),)``, floating; see `fold.flat`.
    """
    if x.dtype == torch.uint8:
        x = x.to(weights.dtype) / 255
    x = x.to(weights.dtype)
    w = _Weights(weights)
    padding = 1
    if plan.normalized:  # what padding adds is 0 behind the normalisation
        mean = w.take(plan.in_chans)
        around = mean.view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[2] + 2, x.shape[3] + 2)
        around = around.clone()
        around[:, :, 1:-1, 1:-1] = x
        x, padding = around, 0
    first = plan.stages[0].channels
    x = F.relu(F.conv2d(x, *w.layer(plan.stem, plan.in_chans, 3), stride=2, padding=padding))
    x = F.relu(F.conv2d(x, *w.layer(first, plan.stem, 3), stride=2, padding=1))
    outputs: list[Tensor] = []
    before = 0
    for stage in plan.stages:
        c = stage.channels
        if before:
            x = F.conv2d(x, *w.layer(c, before, 3), stride=2, padding=1)
        for hidden in stage.hidden:
            x = x + _local(x, w, c)
            x = x + _mixer(x, w, c)
            inner = F.gelu(F.conv2d(x, *w.layer(hidden, c)))
            x = x + F.conv2d(inner, *w.layer(c, hidden))
        if stage.returned:
            outputs.append(_normed(x, w, c))
        before = c
    if plan.head in (MAP, POOLED):
        x = _normed(x, w, before)
    if plan.head in (POOLED, LOGITS):
        x = x.mean((2, 3))
    if plan.head == LOGITS:
        x = F.linear(x, w.take(plan.classes, before), w.take(plan.classes))
    return outputs if plan.head == MAPS else [*outputs, x]


def _local(x: Tensor, w: _Weights, c: int) -> Tensor:
    x = _depthwise(F.conv2d(x, *w.layer(c, c)), w, c)
    return F.conv2d(F.gelu(x), *w.layer(c, c))


def _mixer(x: Tensor, w: _Weights, c: int) -> Tensor:
    q, k, v = F.conv2d(x, *w.layer(3 * c, c)).chunk(3, dim=1)
    mixed = _gate(q, w, c)
    mixed = mixed + _gate(k, w, c)
    return _depthwise(_depthwise(mixed, w, c) * v, w, c)


def _gate(z: Tensor, w: _Weights, c: int) -> Tensor:
    hidden = F.relu(_depthwise(z, w, c))
    z = z * torch.sigmoid(F.conv2d(hidden, w.take(1, c, 1, 1)))
    return z * torch.sigmoid(F.conv2d(z.mean((2, 3), keepdim=True), w.take(c, c, 1, 1)))


def _depthwise(x: Tensor, w: _Weights, c: int) -> Tensor:
    return F.conv2d(x, *w.layer(c, 1, 3), padding=1, groups=c)


def _normed(x: Tensor, w: _Weights, c: int) -> Tensor:
    return x * w.take(1, c, 1, 1) + w.take(1, c, 1, 1)
