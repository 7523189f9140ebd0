"""`TokenClustering` and `TokenReconstruction`: the layers as modules without parameters."""

from __future__ import annotations

from torch import Tensor, nn

from .clusters import Clusters, Size, cluster_tokens, reconstruct_tokens


class TokenClustering(nn.Module):
    """`cluster_tokens` with settings of its own; ``forward(x, size)`` returns `Clusters`.

    Args:
        grid, iterations, window, temperature: as of `cluster_tokens`, which checks them in each call.
    """

    def __init__(
        self, grid: Size, *, iterations: int = 5, window: int = 5, temperature: float = 0.02
    ) -> None:
        super().__init__()
        self.grid, self.iterations = grid, iterations
        self.window, self.temperature = window, temperature

    def forward(self, x: Tensor, size: Size) -> Clusters:
        """x: ``(B, N, C)`` of a map of ``size`` (H, W); raises as `cluster_tokens` does."""
        return cluster_tokens(
            x,
            size,
            self.grid,
            iterations=self.iterations,
            window=self.window,
            temperature=self.temperature,
        )

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, iterations={self.iterations}, window={self.window}, "
            f"temperature={self.temperature}"
        )


class TokenReconstruction(nn.Module):
    """`reconstruct_tokens` with settings of its own; ``forward(y, clusters)``.

    Args:
        neighbours, temperature, norm, window, residual: as of `reconstruct_tokens`, which checks them in
            each call.
    """

    def __init__(
        self,
        *,
        neighbours: int = 20,
        temperature: float | None = None,
        norm: str = "l2",
        window: int | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.neighbours, self.temperature = neighbours, temperature
        self.norm, self.window, self.residual = norm, window, residual

    def forward(self, y: Tensor, clusters: Clusters) -> Tensor:
        """y: ``(B, K, C')``, the refined centres; to ``(B, N, C')``."""
        return reconstruct_tokens(
            y,
            clusters,
            neighbours=self.neighbours,
            temperature=self.temperature,
            norm=self.norm,
            window=self.window,
            residual=self.residual,
        )

    def extra_repr(self) -> str:
        return (
            f"neighbours={self.neighbours}, temperature={self.temperature}, norm={self.norm!r}, "
            f"window={self.window}, residual={self.residual}"
        )
