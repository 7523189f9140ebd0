"""Positions of cluster centres: rotary tables and relative bias at the mean position of their tokens.

Rotary angles are linear in the position, so the mean of the tokens' angles is the angle at the mean
position. A table has sines and cosines alone: the angle at a fraction between two tokens is that of the
first plus the fraction of the step to the second, which their sines and cosines give as long as it is
below pi. It is in the models this serves on maps of more than 4 tokens across; where it is not, the
table cannot tell it from the step below pi. At a token's own position the table comes back.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.tokens.cells import Size


def rotated(
    sin: Tensor, cos: Tensor, size: Size, positions: Tensor, where: str
) -> tuple[Tensor, Tensor]:
    """The tables of centres.

    Args:
        sin, cos: ``(N, D)`` or ``(heads, N, D)`` of a map of ``size``, rows first.
        positions: ``(B, K, 2)``, rows and columns.
        where: for errors.

    Returns:
        ``(B, 1, K, D)`` or ``(B, heads, K, D)`` each, of their dtype.

    Raises:
        ValueError: a table is not of the map's size, or not of angles linear in the position.
    """
    height, width = size
    if sin.dim() not in (2, 3) or sin.shape[-2] != height * width or cos.shape != sin.shape:
        raise ValueError(
            f"{where}: expected rotary tables ({height * width}, D) or (heads, {height * width}, D), "
            f"got {tuple(sin.shape)} and {tuple(cos.shape)}"
        )
    dtype = sin.dtype
    sin, cos = sin.to(positions.dtype), cos.to(positions.dtype)
    down, right = _step(sin, cos, width, 0), _step(sin, cos, 1, 0) if width > 1 else None
    most = positions.new_tensor([height - 1, width - 1])
    first = torch.minimum(positions.floor(), most)
    part = (positions - first)[..., None, :]
    index = (first[..., 0] * width + first[..., 1]).long()
    angle = torch.zeros((), dtype=positions.dtype, device=sin.device)
    if down is not None:
        angle = angle + part[..., 0] * down[..., None, None, :]
    if right is not None:
        angle = angle + part[..., 1] * right[..., None, None, :]
    s, c = sin[..., index, :], cos[..., index, :]  # (..., B, K, D)
    s, c = s * angle.cos() + c * angle.sin(), c * angle.cos() - s * angle.sin()
    s, c = (t.movedim(-3, 0) for t in (s, c))
    if s.dim() == 3:
        s, c = s[:, None], c[:, None]
    return s.to(dtype), c.to(dtype)


def linear(sin: Tensor, cos: Tensor, size: Size) -> bool:
    """Whether angles are linear in the position: one step down and one to the right for all tokens."""
    close = 1e-3 if sin.dtype in (torch.float32, torch.float64) else 5e-2
    s, c = (t.float().unflatten(-2, size) for t in (sin, cos))
    for dim in (-3, -2):
        count = s.shape[dim] - 1
        if count < 1:
            continue
        s0, c0, s1, c1 = (t.narrow(dim, at, count) for at in (0, 1) for t in (s, c))
        for turn in (s1 * c0 - c1 * s0, c1 * c0 + s1 * s0):
            first = turn[..., :1, :1, :]
            if not torch.allclose(turn, first.expand_as(turn), rtol=0, atol=close):
                return False
    return True


def _step(sin: Tensor, cos: Tensor, to: int, of: int) -> Tensor | None:
    """The angle between two tokens, (..., D), in (-pi, pi]; None where there is no second."""
    if to >= sin.shape[-2]:
        return None
    s0, c0, s1, c1 = sin[..., of, :], cos[..., of, :], sin[..., to, :], cos[..., to, :]
    return torch.atan2(s1 * c0 - c1 * s0, c1 * c0 + s1 * s0)


class CallPositions(Protocol):
    """Where `RelativeBias` finds the positions of the call that a block is in."""

    positions: Tensor | None  # (B, K, 2); None: not on centres


class RelativeBias:
    """Stands for ``_get_rel_pos_bias`` of one attention of timm's BEiT, on the instance alone.

    Outside of a clustered block it is the method of its class; inside, the table between the mean
    positions of two centres, linear between its entries.
    """

    def __init__(self, attention: nn.Module, call: CallPositions) -> None:
        self.attention, self.call = attention, call

    def __call__(self) -> Tensor:
        attention: Any = self.attention
        if self.call.positions is None:
            whole: Tensor = type(attention)._get_rel_pos_bias(attention)
            return whole
        return between(
            attention.relative_position_bias_table, attention.window_size, self.call.positions
        )


def between(table: Tensor, size: Size, positions: Tensor) -> Tensor:
    """``(B, heads, 1 + K, 1 + K)`` of a BEiT table, for a class token and K centres.

    Args:
        table: ``((2 H - 1)(2 W - 1) + 3, heads)``; the last three are class to token, token to class and
            class to class.
        size: ``(H, W)``. positions: ``(B, K, 2)``.
    """
    height, width = size
    rows, columns = 2 * height - 1, 2 * width - 1
    count = positions.shape[1]
    maps = table[:-3].to(positions.dtype).T.reshape(1, -1, rows, columns)
    apart = positions[:, :, None] - positions[:, None]  # (B, K, K, 2)
    scale = apart.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    where = apart.flip(-1) / scale  # -1 to 1, columns first
    inner = F.grid_sample(
        maps.expand(positions.shape[0], -1, -1, -1),
        where,
        padding_mode="border",
        align_corners=True,
    )
    to_token, to_class, own = table[-3:, None, :, None, None].to(positions.dtype).unbind(0)
    batch, heads = inner.shape[:2]
    top = to_token.expand(batch, heads, 1, count)
    side = to_class.expand(batch, heads, count, 1)
    corner = own.expand(batch, heads, 1, 1)
    whole = torch.cat((torch.cat((corner, top), 3), torch.cat((side, inner), 3)), 2)
    return whole.to(table.dtype)
