"""Which backend serves a call of the mixer: checks the input, chooses, hands over. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...backends import Problem, select
from ..tracing import exporting, formulas_only
from . import kernels, reference
from .autograd import mix_training
from .cpu import CpuKernels
from .cuda import CudaKernels, Native
from .kernels import MixerKernels
from .schema import Settings, output_memory_format
from .training import update_running
from .triton import TritonKernels
from .weights import MixerWeights, autocasts, check_shapes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_REMEDY = "convert one of them, or use torch.autocast"


class ReferenceKernels:
    """The plain formulas where a backend is asked for by name, or nothing else can serve."""

    name = "reference"
    phases = None

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> None:
        return None

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: object
    ) -> Tensor:
        norms = reference.running_norm(w.q, eps[0]), reference.running_norm(w.k, eps[1])
        out = reference.catm(x, w, *norms)
        return out.contiguous(memory_format=output_memory_format(x))


for _kernels in (
    CpuKernels(),
    CudaKernels("cuda", Native()),
    TritonKernels(),
    ReferenceKernels(),
):
    kernels.register(_kernels)


def trains(chosen: MixerKernels | None, batch: tuple[bool, bool]) -> bool:
    """Whether `train` serves a call whose gates use batch statistics where `batch` says so."""
    return chosen is not None and True in batch and _has_phases(chosen.name)


def train(
    chosen: MixerKernels,
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
    settings = Settings(*eps, *batch, dtype, chosen.name, group)
    out, saved = mix_training(x, w, settings)
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


def check(
    x: Tensor, w: MixerWeights, backend: str | None
) -> tuple[MixerKernels | None, torch.dtype]:
    """Validate one call; the kernels that serve it and the dtype it computes in. Raises as `catm` does.

    The kernels are None where the reference formulas must be called directly: see `formulas_only`.
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
    check_shapes(w)
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
    return kernels.get(_choose(backend, device, dtype, weight.shape[1], x.device.index)), dtype


def _choose(
    backend: str | None, device: str, dtype: torch.dtype, channels: int, index: int | None
) -> str:
    return select(backend, Problem(device, dtype, channels, index)).name


# A compiled function keeps the choice it was compiled with. This is what the decorator
# torch.compiler.assume_constant_result does, without the second that importing it takes.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_phases(backend: str) -> bool:
    return kernels.get(backend).phases is not None


_has_phases._dynamo_marked_constant = True  # type: ignore[attr-defined]
