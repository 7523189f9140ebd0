"""The contract that a backend fills for a whole network, and the formulas in its place.

May import: torch, plan.py, reference.py.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import reference
from .plan import Plan

PRECISIONS = ("fp32", "bf16")  # by the number that kernels take
# What kernels take at most, as csrc/cpu/network/plan.cpp, layout.h and scratch.h say.
MOST_CHANNELS, MOST_HIDDEN, MOST_STAGES = 1024, 9216, 8
MOST_SIDE = 16384  # of an image


class NetworkKernels(Protocol):
    """A network's forward; ints are those of `Plan.to_ints`, precision an index of `PRECISIONS`."""

    def pack(self, weights: Tensor, ints: list[int], precision: int) -> Tensor:
        """What `infer` reads, uint8, of float32 weights in the order of `fold.flat`."""
        ...

    def scratch(
        self, ints: list[int], size: tuple[int, int, int], precision: int, threads: int
    ) -> int:
        """Bytes that `infer` needs for images of size (B, H, W)."""
        ...

    def infer(
        self,
        x: Tensor,
        packed: Tensor,
        ints: list[int],
        precision: int,
        threads: int,
        scratch: Tensor,
        outs: list[Tensor],
    ) -> None:
        """Computes the outputs into `outs`.

        Args:
            x: (B, C, H, W), float32, or uint8 for a normalized plan; any strides, H and W at least 32.
            scratch: uint8, as many bytes as `scratch` says, of any content; of one call at a time.
            outs: float32, of the shapes of `Plan.output_shapes`, contiguous or channels last.
        """
        ...


class FormulaKernels:
    """The reference formulas behind the same contract: what tests put in the kernels' place."""

    def pack(self, weights: Tensor, ints: list[int], precision: int) -> Tensor:
        return weights.clone().view(torch.uint8)

    def scratch(
        self, ints: list[int], size: tuple[int, int, int], precision: int, threads: int
    ) -> int:
        b, height, width = size
        return 4 * b * height * width + sum(ints)  # another network needs another size

    def infer(
        self,
        x: Tensor,
        packed: Tensor,
        ints: list[int],
        precision: int,
        threads: int,
        scratch: Tensor,
        outs: list[Tensor],
    ) -> None:
        plan = Plan.from_ints(ints)
        assert scratch.numel() >= self.scratch(ints, (x.shape[0], *x.shape[2:]), precision, threads)
        computed = reference.compute(x, packed.view(torch.float32), plan)
        for out, value in zip(outs, computed, strict=True):
            out.copy_(value)
