"""Which tokens belong to which cell of the grid, and which cells lie in its window: integers alone.

A token of row y belongs to the grid's row floor(y h / H), so that a cell has at most ceil(H / h) rows of
tokens: the nearest interpolation of the published code, in whole numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]


def reaching(window: int, grid: Size) -> int:
    """The smallest window of the same cells: a larger one has more outside of the grid alone."""
    return min(window, 2 * max(grid) - 1)


class Cells(NamedTuple):
    """K cells of at most m tokens each, J = window**2 cells around each. Of static shapes."""

    tokens: Tensor  # (K, m) indices of a cell's tokens; filled up with its last ones
    filled: Tensor  # (K, m) bool: a token, and not filled up
    around: Tensor  # (K, J) cells in the window, rows first; clamped to the grid
    inside: Tensor  # (K, J) bool: in the grid, and not clamped
    slot: Tensor  # (N,) where a token lies in `tokens`, flattened
    home: Tensor  # (N,) its cell


def cells(size: Size, grid: Size, window: int, device: torch.device) -> Cells:
    """The tables of a map of H x W tokens on a grid of h x w cells; made of a few small operations."""
    rows, columns = (_line(n, g, device) for n, g in zip(size, grid, strict=True))
    width, across = size[1], grid[1]
    tokens = rows.tokens[:, None, :, None] * width + columns.tokens[None, :, None, :]
    filled = rows.filled[:, None, :, None] & columns.filled[None, :, None, :]
    reach = torch.arange(window, device=device) - window // 2
    lines = []
    for cell_count in grid:
        at = torch.arange(cell_count, device=device)[:, None] + reach
        lines.append((at.clamp(0, cell_count - 1), (at >= 0) & (at < cell_count)))
    (y, y_inside), (x, x_inside) = lines
    around = y[:, None, :, None] * across + x[None, :, None, :]
    inside = y_inside[:, None, :, None] & x_inside[None, :, None, :]
    count = grid[0] * across
    home = rows.home[:, None] * across + columns.home[None]
    place = rows.place[:, None] * columns.tokens.shape[1] + columns.place[None]
    each = rows.tokens.shape[1] * columns.tokens.shape[1]
    return Cells(
        tokens.reshape(count, -1),
        filled.reshape(count, -1),
        around.reshape(count, -1),
        inside.reshape(count, -1),
        (home * each + place).flatten(),
        home.flatten(),
    )


class _Line(NamedTuple):
    """Of one direction."""

    tokens: Tensor  # (cells, most)
    filled: Tensor
    home: Tensor  # (tokens,)
    place: Tensor  # (tokens,) among its cell's


def _line(size: int, count: int, device: torch.device) -> _Line:
    starts = -(-torch.arange(count + 1, device=device) * size // count)
    most = -(-size // count)
    tokens = starts[:-1, None] + torch.arange(most, device=device)
    at = torch.arange(size, device=device)
    home = at * count // size
    return _Line(
        tokens.clamp(max=size - 1), tokens < starts[1:, None], home, at - starts[:-1][home]
    )
