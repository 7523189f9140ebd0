"""What token clustering is compared with, at an equal number of tokens: pooling, subsampling, ToMe.

A method makes of the tokens ``(B, N, C)`` after some block and their places ``(1, N, 2)`` the fewer ones
``(B, K, C)`` of the remaining blocks, theirs, and a function that rebuilds the dense map of what these
blocks return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]
Rebuild = Callable[[Tensor], Tensor]
Method = Callable[[Tensor, Tensor, Size, Size], tuple[Tensor, Tensor, Rebuild]]


def maps(x: Tensor, size: Size) -> Tensor:
    """(B, N, C) as (B, C, H, W)."""
    return x.transpose(1, 2).unflatten(2, size)


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def averaged(x: Tensor, size: Size, grid: Size) -> Tensor:
    """(B, N, C) of a map as (B, K, C): means of the grid's cells."""
    return tokens(F.adaptive_avg_pool2d(maps(x, size), grid))


def upsampled(y: Tensor, grid: Size, size: Size, mode: str) -> Tensor:
    """(B, K, C) of a grid as (B, N, C) of a larger one."""
    aligned = False if mode == "bilinear" else None
    return tokens(F.interpolate(maps(y, grid), size, mode=mode, align_corners=aligned))


def pooling(mode: str, residual: bool = False) -> Method:
    """Adaptive average pooling, rebuilt by interpolation; residual: the tokens and their change."""

    def method(x: Tensor, places: Tensor, size: Size, grid: Size) -> tuple[Tensor, Tensor, Rebuild]:
        small, where = averaged(x, size, grid), averaged(places, size, grid)
        if residual:
            return small, where, lambda y: x + upsampled(y - small, grid, size, mode)
        return small, where, lambda y: upsampled(y, grid, size, mode)

    return method


def striding(x: Tensor, places: Tensor, size: Size, grid: Size) -> tuple[Tensor, Tensor, Rebuild]:
    """The token in the middle of each cell, as nearest interpolation picks it, and back."""
    small, where = (
        tokens(F.interpolate(maps(t, size), grid, mode="nearest-exact")) for t in (x, places)
    )
    return small, where, lambda y: upsampled(y, grid, size, "nearest-exact")


class Merged(NamedTuple):
    x: Tensor  # (B, K, C)
    weight: Tensor  # (B, K, 1) tokens that each stands for
    group: Tensor  # (B, N) which of them stands for a token of before


def merged(x: Tensor, key: Tensor, weight: Tensor, count: int) -> Merged:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): `count` tokens fewer.

    Tokens are split in turn into two sets; of the first set the `count` most similar by cosine of
    their keys are merged into the nearest of the second, as means weighted by size.
    """
    b, n, c = x.shape
    key = F.normalize(key, dim=2)
    score, match = (key[:, ::2] @ key[:, 1::2].transpose(1, 2)).max(2)
    order = score.argsort(stable=True, dim=1, descending=True)
    gone, kept = order[:, :count], order[:, count:].sort(1).values
    target = match.gather(1, gone)

    def pick(t: Tensor, at: Tensor) -> Tensor:
        return t.gather(1, at[..., None].expand(-1, -1, t.shape[2]))

    both = torch.cat([x * weight, weight], 2)
    first, second = both[:, ::2], both[:, 1::2]
    index = target[..., None].expand(-1, -1, c + 1)
    second = second.scatter_add(1, index, pick(first, gone))
    both = torch.cat([pick(first, kept), second], 1)
    left = kept.shape[1]
    places = torch.arange(left, device=x.device).expand(b, -1)
    group = torch.empty(b, n, dtype=torch.int64, device=x.device)
    evens = torch.empty_like(order).scatter_(1, kept, places).scatter_(1, gone, target + left)
    group[:, ::2] = evens
    group[:, 1::2] = torch.arange(left, left + second.shape[1], device=x.device)
    total = both[..., c:]
    return Merged(both[..., :c] / total, total, group)


def tome(blocks: nn.ModuleList, x: Tensor, places: Tensor, count: int) -> Tensor:
    """The blocks with merging between attention and MLP until `count` tokens are left; dense again.

    Merging begins in the first block and takes at most a quarter of the tokens of each, as half would
    leave no choice; attention is
    proportional to size; a merged token is at the mean place; a token gets a copy of its merged one.
    """
    weight = x.new_ones(x.shape[0], x.shape[1], 1)
    group = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    places, c = places.expand(x.shape[0], -1, -1), x.shape[2]
    for block in blocks:
        bias = weight.log()[:, None].transpose(2, 3) if x.shape[1] < group.shape[1] else None
        added, key = block.attend(x, places, bias)
        x = x + added
        fewer = min(x.shape[1] // 4, x.shape[1] - count)
        if fewer:
            both, weight, at = merged(torch.cat([x, places], 2), key, weight, fewer)
            x, places = both[..., :c], both[..., c:]
            group = at.gather(1, group)
        x = x + block.mlp(block.norm2(x))
    return x.gather(1, group[..., None].expand(-1, -1, x.shape[2]))
