"""Which backend serves a call of token clustering or reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import Problem, select
from ..tracing import exporting, formulas_only
from . import kernels, local, reference, schema
from .cells import Size
from .cpu import CpuTokenKernels
from .triton import TritonTokenKernels

kernels.register(CpuTokenKernels())
kernels.register(TritonTokenKernels())


def cluster(
    x: Tensor, size: Size, grid: Size, iterations: int, window: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Centres and affinities as `local.cluster`, by kernels where there are some.

    Raises:
        BackendUnavailable: the backend asked for by `use_backend` or the environment cannot serve it.
    """
    given = (size, grid, iterations, window, temperature)
    if exporting() or formulas_only(x, x):
        return local.cluster(x, *given)
    name = _choose(x.device.type, x.dtype, x.device.index)
    if name == "reference" or iterations == 0:  # a pooling, which PyTorch has
        return local.cluster(x, *given)
    return schema.cluster(x, *given, name)


def reconstruct(
    y: Tensor, x: Tensor, centres: Tensor, neighbours: int, temperature: float, norm: str
) -> Tensor:
    """As `reference.reconstruct`: the distances by the library's GEMM, the rest by kernels.

    Raises:
        BackendUnavailable: as `cluster`.
    """
    given = (neighbours, temperature, norm)
    if exporting() or formulas_only(y, x):
        return reference.reconstruct(y, x, centres, *given)
    dtype = x.dtype if x.dtype == torch.float64 else y.dtype
    name = _choose(y.device.type, dtype, y.device.index)
    if name == "reference" or kernels.get(name).reconstruction is None:
        return reference.reconstruct(y, x, centres, *given)
    with torch.no_grad():
        d = reference.distances(reference.wide(x), reference.wide(centres))
    return schema.reconstruct(y, d, *given, name)


def _choose(device: str, dtype: torch.dtype, index: int | None) -> str:
    able = (*kernels.known(), "reference")
    return select(None, Problem(device, dtype, 0, index), able, "token clustering").name


# A compiled function keeps the choice it was compiled with, as of the mixer.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
