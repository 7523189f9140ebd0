"""A whole network on the CPU: the kernels of `csrc/cpu/network`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ...backends import native
from .kernels import PRECISIONS, NetworkKernels


class CpuNetworkKernels:
    """`kernels.NetworkKernels` by the native library."""

    def __init__(self, scratch: Any) -> None:
        self._scratch = scratch

    def pack(self, weights: Tensor, ints: list[int], precision: int) -> Tensor:
        packed: Tensor = torch.ops.casvit_kernels.network_pack(weights, ints, precision)
        return packed

    def scratch(
        self, ints: list[int], size: tuple[int, int, int], precision: int, threads: int
    ) -> int:
        plan = (ctypes.c_int64 * len(ints))(*ints)
        count = int(self._scratch(plan, len(ints), *size, precision, threads))
        if count < 0:
            raise ValueError(
                "plan, size, precision, threads: expected those of a call that kernels serve, "
                f"got {ints}, {size}, {precision} and {threads}"
            )
        return count

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
        torch.ops.casvit_kernels.network_infer.default(
            x, packed, ints, precision, threads, scratch, outs
        )


@functools.cache
def kernels() -> NetworkKernels | None:
    """Those of the native library, or None where it is not there."""
    library, _ = native.load()
    return None if library is None else CpuNetworkKernels(library.casvit_network_scratch)


def has_precision(precision: str) -> bool:
    """Whether the instruction set in use computes in a precision."""
    library, _ = native.load()
    return library is not None and bool(
        library.casvit_network_precision(PRECISIONS.index(precision))
    )
