"""Token clustering and reconstruction by the native library's CPU kernels: csrc/cpu/tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import ReconstructionKernels


class CpuReconstructionKernels:
    def reconstruct(
        self, y: Tensor, distances: Tensor, neighbours: int, temperature: float, norm: str
    ) -> Tensor:
        out: Tensor = torch.ops.casvit_kernels.cpu_reconstruct_tokens(
            y, distances, neighbours, temperature, norm == "l2"
        )
        return out

    def weights(self, distances: Tensor, neighbours: int, temperature: float, norm: str) -> Tensor:
        out: Tensor = torch.ops.casvit_kernels.cpu_token_weights(
            distances, neighbours, temperature, norm == "l2"
        )
        return out


class CpuTokenKernels:
    name = "cpu"
    reconstruction: ReconstructionKernels | None = CpuReconstructionKernels()

    def cluster(
        self,
        x: Tensor,
        size: Sequence[int],
        grid: Sequence[int],
        iterations: int,
        window: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = torch.ops.casvit_kernels.cpu_cluster_tokens(
            x, size, grid, iterations, window, temperature
        )
        return out
