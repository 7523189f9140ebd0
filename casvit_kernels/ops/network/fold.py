"""The weights of a network, by their names in the model, and the flat list that kernels take.

Every norm is multiplied into a neighbour in float64. May import: torch, plan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import LOGITS, MAP, POOLED, Plan

Get = Callable[[str], Tensor]  # a parameter or buffer of the model by its name
Normalize = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation by channel


class Norm(NamedTuple):
    """A BatchNorm with running statistics; strings are names of tensors."""

    mean: str
    var: str
    weight: str | None
    bias: str | None
    eps: float


class Layer(NamedTuple):
    """A convolution or linear layer, with the norms that are folded into it."""

    weight: str
    bias: str | None
    before: Norm | None = None  # of its input; only where nothing is padded
    after: Norm | None = None  # of its output


class Gate(NamedTuple):
    depthwise: Layer
    spatial: Layer  # without bias
    channel: Layer  # without bias


class Block(NamedTuple):
    local: tuple[Layer, Layer, Layer]
    qkv: Layer
    q: Gate
    k: Gate
    dwc: Layer
    proj: Layer
    fc1: Layer
    fc2: Layer


class StageSources(NamedTuple):
    embedding: Layer | None  # None: the stem comes before
    blocks: tuple[Block, ...]
    norm: Norm | None  # of the returned map


class Sources(NamedTuple):
    """Where the weights of a network come from."""

    stem: tuple[Layer, Layer]
    stages: tuple[StageSources, ...]
    norm: Norm | None  # of the head's map or features; a classifier has it in its layers
    heads: tuple[tuple[Layer, float], ...]  # linear layers, and what each counts

    def names(self) -> list[str]:
        """Of every tensor, once."""
        return list(dict.fromkeys(_strings(self)))


def flat(sources: Sources, plan: Plan, get: Get, normalize: Normalize | None) -> Tensor:
    """The weights in the order of the kernels, ``(plan.weight_count(),)`` float64.

    Args:
        get: gives a tensor by its name, of any floating dtype.
        normalize: mean and deviation of images in [0, 1], multiplied into the first convolution; None
            where the plan is not normalized.
    """
    parts: list[Tensor] = []
    first, second = sources.stem
    weight, bias = _folded(first, get)
    if normalize is not None:
        mean, std = (weight.new_tensor(each).view(1, -1, 1, 1) for each in normalize)
        weight = weight / std
        bias = bias - (weight * mean).sum((1, 2, 3))
        parts.append(mean)
    parts += [weight, bias, *_folded(second, get)]
    for stage, planned in zip(sources.stages, plan.stages, strict=True):
        if stage.embedding is not None:
            parts += _folded(stage.embedding, get)
        for block in stage.blocks:
            for layer in (*block.local, block.qkv):
                parts += _folded(layer, get)
            for gate in (block.q, block.k):
                parts += _folded(gate.depthwise, get)
                parts += [get(gate.spatial.weight), get(gate.channel.weight)]
            for layer in (block.dwc, block.proj, block.fc1, block.fc2):
                parts += _folded(layer, get)
        if planned.returned:
            parts += _scale_and_shift(stage.norm, planned.channels, get)
    if plan.head in (MAP, POOLED):
        parts += _scale_and_shift(sources.norm, plan.stages[-1].channels, get)
    elif plan.head == LOGITS:
        weighted = [(_folded(layer, get), share) for layer, share in sources.heads]
        parts.append(torch.stack([w.flatten(1) * share for (w, _), share in weighted]).sum(0))
        parts.append(torch.stack([b * share for (_, b), share in weighted]).sum(0))
    weights = torch.cat([part.detach().to("cpu", torch.float64).flatten() for part in parts])
    assert weights.numel() == plan.weight_count()
    return weights


def _folded(layer: Layer, get: Get) -> tuple[Tensor, Tensor]:
    weight = _wide(get(layer.weight))
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else _wide(get(layer.bias))
    if layer.before is not None:
        scale, shift = _scale_and_shift(layer.before, weight.shape[1], get)
        inputs = (1, -1, *(1,) * (weight.dim() - 2))
        bias = bias + (weight * shift.view(inputs)).flatten(1).sum(1)
        weight = weight * scale.view(inputs)
    if layer.after is not None:
        scale, shift = _scale_and_shift(layer.after, weight.shape[0], get)
        weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
        bias = bias * scale + shift
    return weight, bias


def _scale_and_shift(norm: Norm | None, channels: int, get: Get) -> tuple[Tensor, Tensor]:
    if norm is None:
        ones = torch.ones(channels, dtype=torch.float64, device="cpu")
        return ones, torch.zeros_like(ones)
    scale = (_wide(get(norm.var)) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _wide(get(norm.weight))
    shift = -_wide(get(norm.mean)) * scale
    if norm.bias is not None:
        shift = shift + _wide(get(norm.bias))
    return scale, shift


def _wide(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)


def _strings(tree: object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, tuple):
        for each in tree:
            yield from _strings(each)
