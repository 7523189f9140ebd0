"""`catm`: checks the input, chooses a backend, calls it. No arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backends import get, select
from .backends.base import Backend, Problem
from .reference import GateWeights, MixerWeights, Norm

__all__ = ["GateWeights", "MixerWeights", "catm"]


def catm(
    x: Tensor,
    weights: MixerWeights,
    *,
    eps: tuple[float, float] = (1e-5, 1e-5),
    norms: tuple[Norm, Norm] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The convolutional additive token mixer of CAS-ViT (arXiv 2408.03703, section 3.2).

    Args:
        x: ``(B, C, H, W)`` with B >= 0, C, H, W >= 1; float32, bfloat16, float16 or float64; any
            strides.
        weights: `MixerWeights`, on the device of ``x`` and of its dtype (of any floating dtype under
            autocast).
        eps: the BatchNorm epsilon of the q gate and of the k gate.
        norms: when given, these are called in place of the BatchNorms in ``weights``, for example to
            use and update batch statistics in training. Every backend then runs the reference
            formulas; this version fuses the form with running statistics only.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None chooses (see
            `casvit_kernels.use_backend`). While exporting, the reference is used whatever is asked.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``x`` (or of autocast), channels last if ``x`` has its channels
        innermost, else contiguous. Differentiable with respect to ``x`` and all weights.

    Raises:
        TypeError: ``x`` is no floating tensor, or its dtype and that of the weights differ.
        ValueError: a shape, a device or the backend's name does not fit.
        BackendUnavailable: the backend that was asked for cannot serve this call, with the reason.
    """
    chosen, _ = check(x, weights, backend)
    if norms is not None:
        return reference.catm(x, weights, *norms)
    return chosen.project_and_mix(x, weights, eps, None)


def check(x: Tensor, w: MixerWeights, backend: str | None) -> tuple[Backend, torch.dtype]:
    """Validate one call; its backend and the dtype it computes in. Raises as `catm` does."""
    weight = w.qkv_weight
    if exporting():  # a tracer would record every comparison of sizes
        return get("reference"), x.dtype
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions (B, C, H, W), got shape {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if weight.dim() != 4 or weight.shape[0] != 3 * weight.shape[1]:
        raise ValueError(
            f"weights.qkv_weight: expected shape (3C, C, 1, 1), got {tuple(weight.shape)}"
        )
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x: expected {weight.shape[1]} channels (dim) in dimension 1, "
            f"got {x.shape[1]} in shape {tuple(x.shape)}"
        )
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x: expected H >= 1 and W >= 1, got shape {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(
            f"x: expected the device of the parameters, {weight.device}, got {x.device}"
        )
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        if dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
    elif dtype != weight.dtype:
        raise TypeError(
            f"x: expected the dtype of the parameters, {weight.dtype}, got {dtype} "
            "(convert one of them, or use torch.autocast)"
        )
    return get(_choose(backend, x.device.type, dtype)), dtype


def exporting() -> bool:
    """Whether a tracer that writes a portable graph is running: exports get the plain formulas."""
    return bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.compiler.is_exporting()
        or torch.onnx.is_in_onnx_export()
    )


@torch.compiler.assume_constant_result
def _choose(backend: str | None, device: str, dtype: torch.dtype) -> str:
    # A compiled function keeps the choice it was compiled with.
    return select(backend, Problem(device, dtype)).name
