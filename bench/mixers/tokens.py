"""Maps as tokens and back."""

from __future__ import annotations

from torch import Tensor


def check_dim(dim: int) -> None:
    """Raise `ValueError` unless `dim` is a positive integer."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim: expected an integer >= 1, got {dim!r}")


def to_tokens(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, H W, C)``, row by row."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """``(B, H W, C)`` to ``(B, C, H, W)``, with the height and width of `like`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *like.shape[2:])
