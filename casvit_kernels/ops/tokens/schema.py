"""Operators of `torch.ops.casvit_kernels` for token clustering: definitions, fake kernels, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends import native
from . import local, reference

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
# The weights are made of distances (B, N, K), squared, of float32; they have no gradient.
library.define(
    "reconstruct_tokens(Tensor y, Tensor distances, int neighbours, float temperature, str norm,"
    " str backend) -> Tensor"
)
library.define(
    "cpu_reconstruct_tokens(Tensor y, Tensor distances, int neighbours, float temperature, bool l2)"
    " -> Tensor"
)
# What reconstruction multiplies y by, (B, N, K): its gradient needs the very same choice of centres.
library.define(
    "token_weights(Tensor distances, int neighbours, float temperature, str norm, str backend)"
    " -> Tensor"
)
library.define(
    "cpu_token_weights(Tensor distances, int neighbours, float temperature, bool l2) -> Tensor"
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
    with reference.full_precision(grad.device.type):
        at_x = local.cluster_backward(grad, affinity, tuple(ctx.size), tuple(ctx.grid), ctx.window)
    return at_x.to(ctx.dtype), None, None, None, None, None, None


def reconstruct(
    y: Tensor, distances: Tensor, neighbours: int, temperature: float, norm: str, backend: str
) -> Tensor:
    """As `reference.combine`, by a backend's kernels; one operator for compilers."""
    out: Tensor = torch.ops.casvit_kernels.reconstruct_tokens(
        y, distances, neighbours, temperature, norm, backend
    )
    return out


def _run_reconstruct(
    y: Tensor, distances: Tensor, neighbours: int, temperature: float, norm: str, backend: str
) -> Tensor:
    from .kernels import get

    kernels = get(backend).reconstruction
    assert kernels is not None, "dispatch asks"
    return kernels.reconstruct(y, distances, neighbours, temperature, norm)


def _run_weights(
    distances: Tensor, neighbours: int, temperature: float, norm: str, backend: str
) -> Tensor:
    from .kernels import get

    kernels = get(backend).reconstruction
    assert kernels is not None, "dispatch asks"
    return kernels.weights(distances, neighbours, temperature, norm)


def _fake_weights(
    distances: Tensor, neighbours: int, temperature: float, norm: str, backend: str
) -> Tensor:
    return distances.new_empty(distances.shape)


def _fake_reconstruct(
    y: Tensor, distances: Tensor, neighbours: int, temperature: float, norm: str, backend: str
) -> Tensor:
    return y.new_empty(y.shape[0], distances.shape[1], y.shape[2])


def _keep_reconstruct(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, distances, *ctx.given = inputs
    ctx.save_for_backward(distances)
    ctx.dtype = y.dtype


def _backward_reconstruct(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    with reference.full_precision(grad.device.type):
        weights = torch.ops.casvit_kernels.token_weights(*ctx.saved_tensors, *ctx.given)
        at_y = weights.transpose(1, 2) @ reference.wide(grad)
    return at_y.to(ctx.dtype), None, None, None, None, None


library.impl("cluster_tokens", _run, "CompositeExplicitAutograd")
torch.library.register_fake("casvit_kernels::cluster_tokens", _fake, lib=library)
torch.library.register_autograd(
    "casvit_kernels::cluster_tokens", _backward, setup_context=_keep, lib=library
)
library.impl("reconstruct_tokens", _run_reconstruct, "CompositeExplicitAutograd")
torch.library.register_fake("casvit_kernels::reconstruct_tokens", _fake_reconstruct, lib=library)
torch.library.register_autograd(
    "casvit_kernels::reconstruct_tokens",
    _backward_reconstruct,
    setup_context=_keep_reconstruct,
    lib=library,
)
library.impl("token_weights", _run_weights, "CompositeExplicitAutograd")
torch.library.register_fake("casvit_kernels::token_weights", _fake_weights, lib=library)
