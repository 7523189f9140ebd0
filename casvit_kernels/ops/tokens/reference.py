"""The published formulas, dense: each token is compared with every centre. What kernels are held to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import Size, cells


def full_precision(device: str) -> AbstractContextManager[object]:
    """Within the context autocast leaves products as they are: distances and sums are float32."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def wide(x: Tensor) -> Tensor:
    """In the dtype that distances and sums take: float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def pooled(x: Tensor, size: Size, grid: Size) -> Tensor:
    """The first centres, (B, K, C): the map's adaptive average on the grid."""
    maps = wide(x).transpose(1, 2).unflatten(2, size)
    return F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


def distances(x: Tensor, centres: Tensor) -> Tensor:
    """Squared L2 distances, (B, N, K), of (B, N, C) and (B, K, C); not below 0."""
    # Around the mean: far from 0 the three terms would cancel. Of those that are not NaN, so that
    # one that is has no distance, and the others do.
    mean = centres.nanmean(1, keepdim=True)
    x, centres = x - mean, centres - mean
    squares = x.square().sum(2, keepdim=True) + centres.square().sum(2)[:, None]
    return torch.baddbmm(squares, x, centres.transpose(1, 2), alpha=-2).clamp(min=0)


def cluster(
    x: Tensor, size: Size, grid: Size, iterations: int, window: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Centres (B, K, C) in x's dtype, and the last affinities (B, N, K), without gradient."""
    at = cells(size, grid, window, x.device)
    wide_x, centres = wide(x), pooled(x, size, grid)
    near = torch.zeros(at.inside.shape[0], at.inside.shape[0], dtype=torch.bool, device=x.device)
    near = near.scatter(1, at.around, True)[at.home]
    affinity = near.to(wide_x.dtype).expand(x.shape[0], -1, -1)
    for _ in range(iterations):
        with torch.no_grad():
            logits = -temperature * distances(wide_x, centres)
            affinity = logits.masked_fill(~near, float("-inf")).softmax(2)
            total = affinity.sum(1)[..., None]
        # A centre that no token has any affinity to stays where it is; published: it becomes 0.
        found = affinity.transpose(1, 2) @ wide_x / total.where(total > 0, 1)
        centres = torch.where(total > 0, found, centres)
    return centres.to(x.dtype), affinity


def weights(d: Tensor, neighbours: int, temperature: float, norm: str) -> Tensor:
    """(B, N, K), what each centre counts for a token, of squared distances."""
    # The smallest distance first: no weight of its own underflows, and the norm takes it out.
    found = torch.exp(-temperature * (d - d.amin(2, keepdim=True)))
    least = found.topk(min(neighbours, found.shape[2]), 2).values[..., -1:]
    found = found.where(found >= least, 0)
    return found / (found.norm(dim=2, keepdim=True) if norm == "l2" else found.sum(2, True))


def combine(y: Tensor, d: Tensor, neighbours: int, temperature: float, norm: str) -> Tensor:
    """(B, N, C) of refined centres y (B, K, C), by tokens' squared distances to those before."""
    with torch.no_grad():
        found = weights(d, neighbours, temperature, norm)
    return product(found, wide(y)).to(y.dtype)


def product(weights: Tensor, values: Tensor) -> Tensor:
    """In the wider dtype of the two."""
    dtype = torch.promote_types(weights.dtype, values.dtype)
    return weights.to(dtype) @ values.to(dtype)


def reconstruct(
    y: Tensor, x: Tensor, centres: Tensor, neighbours: int, temperature: float, norm: str
) -> Tensor:
    """(B, N, C) of refined centres y (B, K, C); x and centres are those before the refinement."""
    with torch.no_grad():
        d = distances(wide(x), wide(centres))
    return combine(y, d, neighbours, temperature, norm)
