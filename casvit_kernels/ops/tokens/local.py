"""The formulas at a cost of N x window instead of N x K, of static shapes: for every device.

Weights of cells outside of the window are exactly 0 in the published formulas, so that nothing is left
out. Sums over a centre's tokens are added up window by window in a fixed order: no atomics, and no
result depends on other images of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import Cells, Size, cells
from .reference import pooled, product, wide


def cluster(
    x: Tensor, size: Size, grid: Size, iterations: int, window: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Centres (B, K, C) in x's dtype, and the last affinities (B, N, J), J = window**2, no gradient.

    Differentiable by the last sum alone, as published: affinities count as constants.
    """
    at = cells(size, grid, window, x.device)
    centres = pooled(x, size, grid)
    # (B, K, m, C); where there is no token, not another one's: 0 times NaN is NaN.
    own = wide(x)[:, at.tokens].masked_fill(~at.filled[..., None], 0)
    weights = at.inside[:, None].expand(-1, own.shape[2], -1).to(own.dtype)
    weights = (weights * at.filled[..., None]).expand(x.shape[0], -1, -1, -1)
    for _ in range(iterations):
        with torch.no_grad():
            weights = affinities(own, centres, at, temperature)
            total = fold(weights.sum(2)[..., None], at)
        found = fold(weights.transpose(2, 3) @ own, at) / total.where(total > 0, 1)
        centres = torch.where(total > 0, found, centres)  # see reference.cluster
    return centres.to(x.dtype), weights.flatten(1, 2)[:, at.slot]


def mean(values: Tensor, affinity: Tensor, size: Size, grid: Size, window: int) -> Tensor:
    """Of (B, N, D) the means of cells, (B, K, D), by affinities of `cluster`; wide.

    Of a cell that no token has any affinity to, the adaptive average.
    """
    at = cells(size, grid, window, values.device)
    weights = affinity[:, at.tokens].where(at.filled[..., None], 0)
    total = fold(weights.sum(2)[..., None], at)
    own = wide(values)[:, at.tokens].to(weights.dtype)
    found = fold(weights.transpose(2, 3) @ own, at) / total.where(total > 0, 1)
    return torch.where(total > 0, found, pooled(values, size, grid))


def affinities(own: Tensor, centres: Tensor, at: Cells, temperature: float) -> Tensor:
    """(B, K, m, J) of cells' tokens (B, K, m, C); 0 where there is no token or no cell."""
    # Around the home centre, whose distance the softmax takes out: large tokens do not cancel.
    home = centres[:, :, None]
    around = centres[:, at.around] - home
    dot = (own - home) @ around.transpose(2, 3)
    logits = temperature * (2 * dot - around.square().sum(3)[:, :, None])
    logits = logits.masked_fill(~at.inside[:, None], float("-inf"))
    return logits.softmax(3).where(at.filled[..., None] & at.inside[:, None], 0)


def fold(parts: Tensor, at: Cells) -> Tensor:
    """(B, K, C): for each cell the sum of what those around it have for it in (B, K, J, C)."""
    # What the cell at place j of the window has for this one is at the opposite place of its own.
    opposite = torch.arange(at.around.shape[1] - 1, -1, -1, device=parts.device)
    return parts[:, at.around, opposite].where(at.inside[..., None], 0).sum(2)


def cluster_backward(grad: Tensor, affinity: Tensor, size: Size, grid: Size, window: int) -> Tensor:
    """The gradient at x, (B, N, C) in float32, of one at the centres, (B, K, C)."""
    at = cells(size, grid, window, grad.device)
    weights = affinity[:, at.tokens].where(at.filled[..., None], 0)  # (B, K, m, J)
    total = fold(weights.sum(2)[..., None], at)
    each = wide(grad) / total.where(total > 0, float("inf"))
    return (weights @ each[:, at.around]).flatten(1, 2)[:, at.slot]


def reconstruct(
    y: Tensor,
    x: Tensor,
    centres: Tensor,
    size: Size,
    grid: Size,
    window: int,
    neighbours: int,
    temperature: float,
    norm: str,
) -> Tensor:
    """As `reference.reconstruct`, with the nearest of the window's centres alone."""
    at = cells(size, grid, window, x.device)
    with torch.no_grad():
        home = wide(centres)[:, :, None]
        own, around = wide(x)[:, at.tokens] - home, wide(centres)[:, at.around] - home
        closer = 2 * own @ around.transpose(2, 3) - around.square().sum(3)[:, :, None]
        logits = (temperature * closer).masked_fill(~at.inside[:, None], float("-inf"))
        weights = torch.exp(logits - logits.amax(3, keepdim=True))
        least = weights.topk(min(neighbours, weights.shape[3]), 3).values[..., -1:]
        weights = weights.where(weights >= least, 0)
        weights = weights / (
            weights.norm(dim=3, keepdim=True) if norm == "l2" else weights.sum(3, True)
        )
    out = product(weights, wide(y)[:, at.around])
    return out.flatten(1, 2)[:, at.slot].to(y.dtype)
