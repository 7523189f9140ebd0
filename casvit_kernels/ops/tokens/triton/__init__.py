"""Token clustering in Triton: cluster.py has the kernels and their launches; imports triton late."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import Tensor

from ..kernels import ReconstructionKernels


class TritonTokenKernels:
    name = "triton"
    reconstruction: ReconstructionKernels | None = None  # two products of the library's

    def cluster(
        self,
        x: Tensor,
        size: Sequence[int],
        grid: Sequence[int],
        iterations: int,
        window: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        launches = importlib.import_module(f"{__name__}.cluster")
        out: tuple[Tensor, Tensor] = launches.cluster(
            x, (size[0], size[1]), (grid[0], grid[1]), iterations, window, temperature
        )
        return out
