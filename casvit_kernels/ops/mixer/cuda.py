"""The mixer on NVIDIA GPUs in bfloat16 and float16: the kernels of `csrc/cuda` behind a library product.

Two launches after the qkv product: spatial gates with the sums for the channel gates; then channel gates
and the rest. Training needs the batch statistics in front, and for the backward other kernels. The
operators are an argument, so that the emulation in tests/ runs everything here on CPU tensors.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.cuda import channels_read
from ..tracing import is_opaque
from .autograd import mix_training
from .kernels import Combined, Gated, Mixed, Phases, ProjectionGradients
from .schema import Settings, empty_output, output_memory_format
from .weights import MixerWeights, flatten

Shape = tuple[int, int, int, int]


class Operators(Protocol):
    """The calls into the kernels. rows: qkv, (B, H W or H, W, 3P), P channels in multiples of 4."""

    def pack(
        self,
        w: MixerWeights,
        statistics: Tensor | None,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        """All weights but the product's, BatchNorm folded; without statistics for `statistics` alone."""
        ...

    def statistics(self, rows: Tensor, packed: Tensor, shape: Shape) -> Tensor:
        """(2, 2, C): of q and k, mean and biased variance."""
        ...

    def mix(self, rows: Tensor, packed: Tensor, shape: Shape, channels_last: bool) -> Mixed: ...

    def infer(
        self, x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, packed: Tensor
    ) -> Tensor: ...


class Native:
    """`Operators` of the native library."""

    def pack(
        self,
        w: MixerWeights,
        statistics: Tensor | None,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        out: Tensor = torch.ops.casvit_kernels.cuda_pack(*flatten(w), *eps, statistics, dtype)
        return out

    def statistics(self, rows: Tensor, packed: Tensor, shape: Shape) -> Tensor:
        out: Tensor = torch.ops.casvit_kernels.cuda_statistics(rows, packed, shape)
        return out

    def mix(self, rows: Tensor, packed: Tensor, shape: Shape, channels_last: bool) -> Mixed:
        return Mixed(*torch.ops.casvit_kernels.cuda_mix(rows, packed, shape, channels_last))

    def infer(
        self, x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, packed: Tensor
    ) -> Tensor:
        out: Tensor = torch.ops.casvit_kernels.cuda_infer(x, qkv_weight, qkv_bias, packed)
        return out


class Packed(NamedTuple):
    """A mixer's weights for inference."""

    qkv_weight: Tensor  # (3P, C), of the dtype computed in
    qkv_bias: Tensor | None  # (3P,)
    words: Tensor  # what `Operators.pack` returns


class Projected:
    """qkv for the kernels of the forward or, when asked for it, for those of the backward."""

    def __init__(self, x: Tensor, w: MixerWeights, dtype: torch.dtype, backward: Backward) -> None:
        self._given = (x, w, dtype)
        self._backward = backward

    @functools.cached_property
    def rows(self) -> Tensor:
        x, w, dtype = self._given
        return product(x, *padded_product(w, dtype))

    @functools.cached_property
    def for_backward(self) -> Any:
        x, w, _ = self._given
        return self._backward.adopt(self.rows, x, w)


def padded_product(w: MixerWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The product's weights, in the dtype, with zero rows up to the channels that kernels read."""
    weight, bias = w.qkv_weight.flatten(1).to(dtype), w.qkv_bias
    c = weight.shape[1]
    more = channels_read(c) - c
    if more:
        weight = F.pad(weight.view(3, c, c), (0, 0, 0, more)).flatten(0, 1)
    if bias is not None:
        bias = bias.to(dtype)
        bias = F.pad(bias.view(3, c), (0, more)).flatten() if more else bias
    return weight, bias


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """qkv with channels innermost whatever x's layout is; either is a plain GEMM."""
    x = x.to(weight.dtype)
    if output_memory_format(x) is torch.channels_last:
        return F.linear(x.permute(0, 2, 3, 1).contiguous(), weight, bias)
    return F.linear(x.contiguous().flatten(2).transpose(1, 2), weight, bias)


class Backward(Phases, Protocol):
    """Another backend's phases, of which the backward ones are used."""

    def adopt(self, rows: Tensor, x: Tensor, w: MixerWeights) -> Any:
        """What its `project` would return, of the very q, k and v that the forward has computed.

        A product of its own may round another way: a ReLU that was open in the forward would be shut.
        """
        ...


class CudaPhases:
    """`kernels.Phases`: the forward by these kernels, the backward by another backend's."""

    def __init__(self, operators: Operators, backward: Backward) -> None:
        self._operators = operators
        self._backward = backward

    def project(self, x: Tensor, w: MixerWeights, dtype: torch.dtype) -> Projected:
        return Projected(x, w, dtype, self._backward)

    def statistics(self, x: Tensor, qkv: Projected, w: MixerWeights) -> Tensor:
        packed = self._operators.pack(w, None, (0.0, 0.0), qkv.rows.dtype)
        return self._operators.statistics(qkv.rows, packed, _shape(x))

    def mix(
        self,
        x: Tensor,
        qkv: Projected,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Mixed:
        packed = self._operators.pack(w, statistics, eps, dtype)
        return self._operators.mix(qkv.rows, packed, _shape(x), _channels_last(x))

    def backward_combine(
        self,
        grad: Tensor,
        x: Tensor,
        qkv: Projected,
        w: MixerWeights,
        spatial: Tensor,
        channel: Tensor,
    ) -> Combined:
        return self._backward.backward_combine(grad, x, qkv.for_backward, w, spatial, channel)

    def backward_gate(
        self,
        x: Tensor,
        qkv: Projected,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        spatial: Tensor,
        pixel: Tensor,
        shift: Tensor,
    ) -> Gated:
        return self._backward.backward_gate(
            x, qkv.for_backward, w, statistics, eps, spatial, pixel, shift
        )

    def backward_depthwise(
        self,
        x: Tensor,
        qkv: Projected,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        spatial: Tensor,
        channel: Tensor,
        shift: Tensor,
        logit: Tensor,
        coefficients: Tensor,
        grad_sum: Tensor,
        grad_qkv: Any,
    ) -> tuple[Tensor, Tensor]:
        return self._backward.backward_depthwise(
            x,
            qkv.for_backward,
            w,
            statistics,
            eps,
            spatial,
            channel,
            shift,
            logit,
            coefficients,
            grad_sum,
            grad_qkv,
        )

    def project_backward(
        self, grad_qkv: Any, x: Tensor, w: MixerWeights, needed: tuple[bool, bool, bool]
    ) -> ProjectionGradients:
        return self._backward.project_backward(grad_qkv, x, w, needed)


class CudaKernels:
    """`kernels.MixerKernels` on any `Operators`."""

    def __init__(self, name: str, operators: Operators) -> None:
        self.name = name
        self._operators = operators

    @functools.cached_property
    def phases(self) -> Phases:
        return CudaPhases(self._operators, _triton())

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> Packed:
        moments = (w.q.norm_mean, w.q.norm_var, w.k.norm_mean, w.k.norm_var)
        statistics = torch.stack([t.float() for t in moments if t is not None])
        words = self._operators.pack(w, statistics.view(2, 2, -1), eps, dtype)
        return Packed(*padded_product(w, dtype), words)

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Packed | None
    ) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if packed is None or is_opaque() or _differentiates(x, w):
            settings = Settings(*eps, False, False, dtype, self.name, "")
            return mix_training(x, w, settings)[0]
        if x.shape[0] == 0:
            return empty_output(x, dtype)
        with torch.autocast(device, enabled=False):
            return self._operators.infer(x, *packed)


def _triton() -> Backward:
    """Triton's phases; imports triton."""
    from .triton import phases as triton

    class Adopting(triton.TritonPhases):
        def adopt(self, rows: Tensor, x: Tensor, w: MixerWeights) -> triton.Projected:
            b, c, height, width = x.shape
            parts = rows.view(b, height, width, 3, -1)[..., :c]
            maps = parts.flatten(3).permute(0, 3, 1, 2)  # a view where C is a multiple of 4
            layout = output_memory_format(x)
            return triton.Projected(maps.contiguous(memory_format=layout), triton.vectors(w))

    return Adopting()


def _differentiates(x: Tensor, w: MixerWeights) -> bool:
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *flatten(w))
    )


def _channels_last(x: Tensor) -> bool:
    return output_memory_format(x) is torch.channels_last


def _shape(x: Tensor) -> Shape:
    b, c, height, width = x.shape
    return b, c, height, width
