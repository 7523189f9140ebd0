"""The operator of `torch.ops.casvit_kernels` for token clustering: definition, fake kernel, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends import native
from . import local

library = torch.library.Library("casvit_kernels", "FRAGMENT")
# affinity: (B, N, window**2) of the last iteration, of float32 (float64 for float64); the gradient's.
library.define(
    "cluster_tokens(Tensor x, int[] size, int[] grid, int iterations, int window, float temperature,"
    " str backend) -> (Tensor centres, Tensor affinity)"
)
library.define(
    "cpu_cluster_tokens(Tensor x, int[] size, int[] grid, int iterations, int window,"
    " float temperature) -> (Tensor centres, Tensor affinity)"
)
native.load()


def cluster(
    x: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    iterations: int,
    window: int,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `local.cluster`, by a backend's kernels; one operator for compilers, differentiable."""
    out: tuple[Tensor, Tensor] = torch.ops.casvit_kernels.cluster_tokens(
        x, size, grid, iterations, window, temperature, backend
    )
    return out


def _run(
    x: Tensor,
    size: Sequence[int],
    grid: Sequence[int],
    iterations: int,
    window: int,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from .kernels import get

    return get(backend).cluster(x, size, grid, iterations, window, temperature)


def _fake(
    x: Tensor,
    size: Sequence[int],
    grid: Sequence[int],
    iterations: int,
    window: int,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    b, n, c = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    centres = x.new_empty(b, grid[0] * grid[1], c)
    return centres, x.new_empty(b, n, window * window, dtype=wide)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, ctx.size, ctx.grid, _, ctx.window, _, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    (affinity,) = ctx.saved_tensors
    at_x = local.cluster_backward(grad, affinity, tuple(ctx.size), tuple(ctx.grid), ctx.window)
    return at_x.to(ctx.dtype), None, None, None, None, None, None


library.impl("cluster_tokens", _run, "CompositeExplicitAutograd")
torch.library.register_fake("casvit_kernels::cluster_tokens", _fake, lib=library)
torch.library.register_autograd(
    "casvit_kernels::cluster_tokens", _backward, setup_context=_keep, lib=library
)
