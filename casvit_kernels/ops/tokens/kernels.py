"""The contract that a backend fills for token clustering; all that a new backend has to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class ReconstructionKernels(Protocol):
    """Reconstruction from squared distances (B, N, K) of float32, without gradients."""

    def reconstruct(
        self, y: Tensor, distances: Tensor, neighbours: int, temperature: float, norm: str
    ) -> Tensor:
        """As `reference.combine`: y (B, K, C) of any strides; (B, N, C) of its dtype."""
        ...

    def weights(self, distances: Tensor, neighbours: int, temperature: float, norm: str) -> Tensor:
        """As `reference.weights`, of the same bits that `reconstruct` multiplies y by."""
        ...


class TokenKernels(Protocol):
    """One backend's clustering and reconstruction, without gradients."""

    name: str  #: the backend's
    reconstruction: ReconstructionKernels | None  #: None where the formulas serve

    def cluster(
        self,
        x: Tensor,
        size: Sequence[int],
        grid: Sequence[int],
        iterations: int,
        window: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """As `local.cluster`: x (B, N, C) of any strides; centres (B, K, C) of its dtype, contiguous;
        iterations at least 1;
        affinities (B, N, window**2) of float32 (of float64 for float64), 0 outside of the grid."""
        ...


_TABLE: dict[str, TokenKernels] = {}


def register(kernels: TokenKernels) -> None:
    """Enter a backend's kernels under its name."""
    _TABLE[kernels.name] = kernels


def get(name: str) -> TokenKernels:
    """The kernels of a backend that has some: see `known`."""
    return _TABLE[name]


def known() -> tuple[str, ...]:
    """The backends that have kernels."""
    return tuple(_TABLE)
