"""`catm`: checks the input, chooses a backend, calls it. No arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from . import reference
from .backends import get, select
from .backends.base import Backend, Problem
from .reference import GateWeights, MixerWeights, Norm

__all__ = ["GateWeights", "MixerWeights", "catm"]

_REMEDY = "convert one of them, or use torch.autocast"


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
            `casvit_kernels.use_backend`). Whatever is asked, the reference formulas serve exports,
            `torch.func` transforms, forward-mode AD and tensors without values (meta, fake): only
            they can be followed there.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``x`` (or of autocast), channels last if ``x`` has its channels
        innermost, else contiguous (with ``norms``, or where only the reference formulas serve: as the
        convolutions of PyTorch lay it out). Differentiable with respect to ``x`` and all weights, any
        number of times.

    Raises:
        TypeError: ``x`` is no floating tensor, or its dtype and that of the weights differ (under
            autocast: one of them is float64, which autocast leaves alone, and the other is not).
        ValueError: a shape, a device or the backend's name does not fit, or running statistics are
            missing.
        BackendUnavailable: the backend that was asked for cannot serve this call, with the reason.
    """
    chosen, _ = check(x, weights, backend)
    plain = norms or (
        reference.running_norm(weights.q, eps[0]),
        reference.running_norm(weights.k, eps[1]),
    )
    if chosen is None or norms is not None:
        return reference.catm(x, weights, *plain)
    return chosen.project_and_mix(x, weights, eps, None)


def check(x: Tensor, w: MixerWeights, backend: str | None) -> tuple[Backend | None, torch.dtype]:
    """Validate one call; its backend and the dtype it computes in. Raises as `catm` does.

    The backend is None where the reference formulas must be called directly: see `formulas_only`.
    """
    weight = w.qkv_weight
    if exporting():  # a tracer would record every comparison of sizes
        return None, x.dtype
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
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if dtype != weight.dtype and (not autocast or torch.float64 in (dtype, weight.dtype)):
        raise TypeError(
            f"x: expected the dtype of the parameters, {weight.dtype}, got {dtype} "
            f"({'autocast leaves float64 alone' if autocast else _REMEDY})"
        )
    if autocast and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if formulas_only(x, weight):
        return None, dtype
    return get(_choose(backend, device, dtype)), dtype


def exporting() -> bool:
    """Whether a tracer that writes a portable graph is running: exports get the plain formulas."""
    return bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.compiler.is_exporting()
        or torch.onnx.is_in_onnx_export()
    )


def formulas_only(x: Tensor, weight: Tensor) -> bool:
    """Whether something follows each operation that cannot look into a fused one.

    Beside `exporting`: `torch.func` transforms, forward-mode AD, tensors without values. A compiler is
    not among them: it takes the operator as a whole.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or x.is_meta
        or isinstance(x, FakeTensor)
        or isinstance(weight, FakeTensor)
    )


def _choose(backend: str | None, device: str, dtype: torch.dtype) -> str:
    return select(backend, Problem(device, dtype)).name


# A compiled function keeps the choice it was compiled with. This is what the decorator
# torch.compiler.assume_constant_result does, without the second that importing it takes.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
