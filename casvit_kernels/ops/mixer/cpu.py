"""The mixer on the CPU: the kernels of `csrc/cpu` through the operators of `schema.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ...backends import native
from ..tracing import is_opaque
from . import schema
from .kernels import Combined, Gated, Mixed, ProjectionGradients, WholeStep
from .weights import MixerWeights, autocasts, flatten

KEPT_FLOATS = (256 << 20) // 4


class Workspace(threading.local):
    """Memory of a thread for what only the phases of one call read, kept between calls.

    Fresh memory of this size costs a page fault for every 4 KB, in each call: measured 3 to 6 ms of
    17 at stage 1 of rcvit_xs. Pieces of more than 256 MB are not kept.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, Tensor] = {}

    def take(self, name: str, floats: int) -> Tensor:
        """``(floats,)`` float32, not initialised; it is that name's until the next call."""
        piece = self._pieces.get(name)
        if piece is None or piece.numel() < floats:
            self._pieces.pop(name, None)
            # A thread may first come here in inference mode: its tensors could not be written later.
            with torch.inference_mode(False):
                piece = torch.empty(floats)
            if floats <= KEPT_FLOATS:
                self._pieces[name] = piece
        return piece[:floats]


class CpuPhases(WholeStep):
    """Training: `kernels.Phases` by the kernels of `csrc/cpu`, float32 inside whatever goes in.

    qkv is what `cpu_project` lays out; grad_qkv is (B*H*W, 3C), one row for each pixel.
    """

    def project(self, x: Tensor, w: MixerWeights, dtype: torch.dtype) -> Tensor:
        qkv = _workspace.take("qkv", floats("qkv", x.shape))
        _cpu.cpu_project(x, w.qkv_weight, w.qkv_bias, dtype, qkv)
        return qkv

    def statistics(self, x: Tensor, qkv: Tensor, w: MixerWeights) -> Tensor:
        statistics: Tensor = _cpu.cpu_statistics(qkv, x.shape, *_arguments(w))
        return statistics

    def mix(
        self,
        x: Tensor,
        qkv: Tensor,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Mixed:
        return Mixed(*_cpu.cpu_mix(x, qkv, *_arguments(w, eps), statistics, dtype))

    def backward_combine(
        self,
        grad: Tensor,
        x: Tensor,
        qkv: Tensor,
        w: MixerWeights,
        spatial: Tensor,
        channel: Tensor,
    ) -> Combined:
        b, c, height, width = x.shape
        grad_qkv = _workspace.take("grad_qkv", b * height * width * 3 * c).view(-1, 3 * c)
        grad_sum = _workspace.take("grad_sum", floats("grad_sum", x.shape))
        found = _cpu.cpu_backward_combine(
            grad, qkv, *_arguments(w), spatial, channel, grad_qkv, grad_sum
        )
        return Combined(grad_qkv, grad_sum, *found)

    def backward_gate(
        self,
        x: Tensor,
        qkv: Tensor,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        spatial: Tensor,
        pixel: Tensor,
        shift: Tensor,
    ) -> Gated:
        return Gated(
            *_cpu.cpu_backward_gate(
                qkv, x.shape, *_arguments(w, eps), statistics, spatial, pixel, shift
            )
        )

    def backward_depthwise(
        self,
        x: Tensor,
        qkv: Tensor,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        spatial: Tensor,
        channel: Tensor,
        shift: Tensor,
        logit: Tensor,
        coefficients: Tensor,
        grad_sum: Tensor,
        grad_qkv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weight, bias = _cpu.cpu_backward_depthwise(
            qkv,
            x.shape,
            *_arguments(w, eps),
            statistics,
            spatial,
            channel,
            shift,
            logit,
            coefficients,
            grad_sum,
            grad_qkv,
        )
        return weight, bias

    def project_backward(
        self, grad_qkv: Tensor, x: Tensor, w: MixerWeights, needed: tuple[bool, bool, bool]
    ) -> ProjectionGradients:
        need_x, need_weight, need_bias = needed
        of_x, of_weight, of_bias = _cpu.cpu_project_backward(
            grad_qkv, x, w.qkv_weight, x.dtype, *needed
        )
        return ProjectionGradients(
            of_x if need_x else None,
            of_weight if need_weight else None,
            of_bias if need_bias else None,
        )

    def forward(
        self,
        x: Tensor,
        w: MixerWeights,
        eps: tuple[float, float],
        batch: tuple[bool, bool],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        qkv = _workspace.take("qkv", floats("qkv", x.shape))
        found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
        found = _cpu.cpu_forward(x, *_arguments(w, eps), *batch, dtype, qkv)
        return found

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        w: MixerWeights,
        eps: tuple[float, float],
        batch: tuple[bool, bool],
        dtype: torch.dtype,
        small: tuple[Tensor, Tensor, Tensor, Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor]:
        b, c, height, width = x.shape
        qkv = _workspace.take("qkv", floats("qkv", x.shape))
        grad_qkv = _workspace.take("grad_qkv", b * height * width * 3 * c).view(-1, 3 * c)
        grad_sum = _workspace.take("grad_sum", floats("grad_sum", x.shape))
        bits = sum(n << i for i, n in enumerate(needed))
        found: list[Tensor] = _cpu.cpu_backward(
            grad, x, *_arguments(w, eps), *batch, dtype, *small, bits, qkv, grad_qkv, grad_sum
        )
        return found


_cpu = torch.ops.casvit_kernels
# `CpuKernels.project_and_mix` where no gradient, autocast or observer asks for more.
infer: Callable[[Tensor, Tensor], Tensor] = _cpu.cpu_infer.default  # of x and packed
_workspace = Workspace()


def floats(name: str, shape: Sequence[int]) -> int:
    """How many floats "qkv" or "grad_sum" takes for x of a shape, with the kernels in use."""
    library, _ = native.load()
    return int(getattr(library, f"casvit_cpu_{name}_floats")(*shape))


def _arguments(w: MixerWeights, eps: tuple[float, float] = (0.0, 0.0)) -> tuple[Any, ...]:
    return (*flatten(w), *eps)


class CpuKernels:
    name = "cpu"
    phases = CpuPhases()

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> Tensor | None:
        # Of other kinds of tensors the operator would see, and remember, what is made for it alone.
        if any(
            t is not None and (type(t) not in (Tensor, Parameter) or t.is_neg()) for t in flatten(w)
        ):
            return None
        packed = schema.pack(w, eps, dtype)
        _cpu.cpu_remember(packed, *_arguments(w, eps))
        return packed

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Tensor | None
    ) -> Tensor:
        if packed is None or torch.is_grad_enabled() or is_opaque() or autocasts(w):
            return schema.project_and_mix(x, w, eps, packed)
        return infer(x, packed)
