"""The page's pictures as embedded PNG files: cluster borders, and feature maps in colours."""

from __future__ import annotations

import base64
import io

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._optional import need

LINE = (255, 214, 0)  # of borders
_OUTLIERS = 0.01  # of the values at either end of a colour, which are cut off


def borders(pixels: Tensor, labels: Tensor) -> Tensor:
    """The photograph with a line wherever two neighbouring tokens are of different clusters.

    Args:
        pixels: ``(S, S, 3)`` uint8. labels: ``(H, W)`` int64, of the map's tokens.

    Returns:
        ``(S, S, 3)`` uint8. The line is one pixel wide, on the upper or left side of a border.
    """
    shape = pixels.shape[:2]
    # Whole numbers up to 2^53 are exact in float64.
    wide = F.interpolate(labels[None, None].double(), tuple(shape), mode="nearest")[0, 0]
    edge = torch.zeros(shape, dtype=torch.bool)
    edge[:-1] |= wide[:-1] != wide[1:]
    edge[:, :-1] |= wide[:, :-1] != wide[:, 1:]
    drawn = pixels.clone()
    drawn[edge] = torch.tensor(LINE, dtype=torch.uint8)
    return drawn


def colours(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Two feature maps in colours of one basis: equal features get equal colours.

    Red, green and blue are the first three principal components of the tokens of both together, each
    from its lowest to its highest value but for outliers.

    Args:
        before, after: ``(H, W, C)``.

    Returns:
        ``(H, W, 3)`` uint8 each.
    """
    tokens = torch.stack((before, after)).flatten(0, 2).double()
    tokens = tokens - tokens.mean(0)
    _, vectors = torch.linalg.eigh(tokens.T @ tokens)  # of ascending values
    basis = vectors[:, -3:].flip(1)
    if basis.shape[1] < 3:
        basis = F.pad(basis, (0, 3 - basis.shape[1]))
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    values = tokens @ (basis * torch.where(largest < 0, -1.0, 1.0))
    limits = torch.tensor([_OUTLIERS, 1 - _OUTLIERS], dtype=values.dtype)
    low, high = values.quantile(limits, 0)
    scaled = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    drawn = (scaled * 255).round().to(torch.uint8).view(2, *before.shape[:2], 3)
    return drawn[0], drawn[1]


def png(pixels: Tensor) -> str:
    """Data URI of ``(H, W, 3)`` uint8, without loss."""
    out = io.BytesIO()
    need("PIL.Image").fromarray(pixels.contiguous().numpy()).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
