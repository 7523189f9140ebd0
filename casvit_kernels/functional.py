"""`catm`: checks the input, chooses a backend, calls it. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from . import ops, reference
from .backends import get, select
from .backends.base import Backend, Problem
from .reference import GateWeights, MixerWeights
from .training import update_running
from .weights import autocasts, check_alike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GateWeights", "MixerWeights", "catm"]

_T = TypeVar("_T")
_REMEDY = "convert one of them, or use torch.autocast"


def catm(
    x: Tensor,
    weights: MixerWeights,
    *,
    eps: tuple[float, float] = (1e-5, 1e-5),
    training: bool | tuple[bool, bool] = False,
    momentum: float | tuple[float, float] = 0.1,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """The convolutional additive token mixer of CAS-ViT (arXiv 2408.03703, section 3.2).

    Args:
        x: ``(B, C, H, W)`` with B >= 0, C, H, W >= 1; float32, bfloat16, float16 or float64; any
            strides.
        weights: `MixerWeights`, on the device of ``x`` and of its dtype (of any floating dtype under
            autocast).
        eps: the BatchNorm epsilon of the q gate and of the k gate.
        training: whether BatchNorm uses the statistics of this batch; a pair says it for the q gate
            and the k gate. The running statistics in ``weights`` may then be None, else they are
            updated in place, as by `torch.nn.functional.batch_norm`.
        momentum: weight of this batch in that update; a pair for the q gate and the k gate.
        process_group: batch statistics are those of all processes of this group together, as by
            `torch.nn.SyncBatchNorm`; None: of this process.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None chooses (see
            `casvit_kernels.use_backend`). Whatever is asked, the reference formulas serve exports,
            `torch.func` transforms, forward-mode AD and tensors without values (meta, fake): only
            they can be followed there. They also serve training on a backend without kernels for it.

    Returns:
        ``(B, C, H, W)`` of the dtype of ``x`` (or of autocast), channels last if ``x`` has its channels
        innermost, else contiguous (where the reference formulas serve: as the convolutions of PyTorch
        lay it out). Differentiable with respect to ``x`` and all weights. Second derivatives
        differentiate the reference formulas; higher ones exist where PyTorch has them (not of batch
        statistics), and with a process group they raise NotImplementedError. For the backward ``x``
        and the weights are kept, and nothing else of the size of ``x``.

    Raises:
        TypeError: ``x`` is no floating tensor, ``training`` or ``momentum`` is not as above, or ``x``
            and the weights differ in dtype (under autocast: one of them is float64, which autocast
            leaves alone, and another is not). BatchNorm's may be float32 beside narrower ones.
        ValueError: a shape, a device or the backend's name does not fit, running statistics are
            missing, there is one value per channel to take statistics of, or the reference formulas
            must serve a call with a process group.
        BackendUnavailable: the backend that was asked for cannot serve this call, with the reason.
    """
    chosen, dtype = check(x, weights, backend)
    check_alike(weights)
    batch = _pair("training", training, bool)
    momenta = _pair("momentum", momentum, (int, float))
    norms = list(map(ops.formula_norm, (weights.q, weights.k), eps, batch, momenta))
    if trains(chosen, batch):
        assert chosen is not None
        group = "" if process_group is None else group_name(process_group)
        return train(chosen, x, weights, eps, batch, momenta, group, dtype)
    if chosen is not None and True not in batch:
        return chosen.project_and_mix(x, weights, eps, None)
    if process_group is not None and True in batch:
        raise ValueError(
            "process_group: expected None where the reference formulas serve, "
            f"which know one process only, got {process_group}"
        )
    return reference.catm(x, weights, *norms)


def trains(chosen: Backend | None, batch: tuple[bool, bool]) -> bool:
    """Whether `train` serves a call whose gates use batch statistics where `batch` says so."""
    return chosen is not None and True in batch and _has_phases(chosen.name)


def train(
    chosen: Backend,
    x: Tensor,
    w: MixerWeights,
    eps: tuple[float, float],
    batch: tuple[bool, bool],
    momentum: tuple[float | Tensor, float | Tensor],
    group: str,
    dtype: torch.dtype,
) -> Tensor:
    """The mixer on a backend's training kernels; updates what running statistics w has."""
    b, _, height, width = x.shape
    if b * height * width == 1 and not group:
        raise ValueError(
            "x: expected more than 1 value per channel when training, "
            f"got input size {tuple(x.shape)}"
        )
    for name, gate in (("q", w.q), ("k", w.k)):
        if (gate.norm_mean is None) != (gate.norm_var is None):
            missing = "norm_mean" if gate.norm_mean is None else "norm_var"
            raise ValueError(
                f"weights.{name}: expected both running statistics or none, got no {missing}"
            )
    settings = ops.Settings(*eps, *batch, dtype, chosen.name, group)
    out, saved = ops.mix_training(x, w, settings)
    if b > 0 or group:
        fixed = not (group or torch.compiler.is_compiling())
        number = b * height * width if fixed else saved.number
        for i, gate in enumerate((w.q, w.k)):
            mean, var, weight = gate.norm_mean, gate.norm_var, momentum[i]
            if batch[i] and mean is not None and var is not None:
                if group:  # all processes may be without an image
                    weight = weight * (saved.number > 0)
                update_running((mean, var), saved.statistics[i], number, weight)
    return out


def group_name(group: ProcessGroup) -> str:
    """The name by which an operator finds the group, "" for a group of one."""
    return group.group_name if group.size() > 1 else ""


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
    _, channels, height, width = x.shape
    if channels != weight.shape[1]:
        raise ValueError(
            f"x: expected {weight.shape[1]} channels (dim) in dimension 1, "
            f"got {channels} in shape {tuple(x.shape)}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"x: expected H >= 1 and W >= 1, got shape {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(
            f"x: expected the device of the parameters, {weight.device}, got {x.device}"
        )
    dtype = x.dtype
    device = x.device.type
    autocast = autocasts(w)
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
    """Whether a tracer that writes a portable graph is running: exports get the plain formulas.

    Those to ONNX trace by one of the two; to ask for them takes a microsecond of every call.
    """
    return bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.compiler.is_exporting()
    )


def formulas_only(x: Tensor, weight: Tensor) -> bool:
    """Whether something follows each operation that cannot look into a fused one.

    Beside `exporting`: `torch.func` transforms, forward-mode AD, tensors without values. A compiler is
    not among them: it takes the operator as a whole.
    """
    if torch.compiler.is_compiling():
        return False
    return transformed() or x.is_meta or isinstance(x, FakeTensor) or isinstance(weight, FakeTensor)


def transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _choose(backend: str | None, device: str, dtype: torch.dtype) -> str:
    return select(backend, Problem(device, dtype)).name


# A compiled function keeps the choice it was compiled with. This is what the decorator
# torch.compiler.assume_constant_result does, without the second that importing it takes.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_phases(backend: str) -> bool:
    return get(backend).phases is not None


_has_phases._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pair(name: str, value: _T | tuple[_T, _T], kind: type | tuple[type, ...]) -> tuple[_T, _T]:
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, kind) for v in pair):
        what = "bool" if kind is bool else "number"
        raise TypeError(f"{name}: expected a {what} or a tuple of two, got {value!r}")
    return pair
