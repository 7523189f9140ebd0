"""Training and inference by the Triton kernels: tensors for their results, and their launches.

Imported on first use: `import casvit_kernels` needs no triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Combined, Gated, Mixed, ProjectionGradients
from ..schema import empty_output, output_memory_format
from ..weights import MixerWeights
from .launch import launch
from .packed import Packed, qkv_of, vectors
from .plan import maps_of, plan

ALIGNMENT = 16  # bytes; kernels are compiled for tensors that have it, as all allocated here do


class Projected(NamedTuple):
    """What `project` hands to the other phases."""

    qkv: Tensor  # (B, 3C, H, W), channels innermost or contiguous as `output_memory_format(x)`
    vectors: Tensor  # see `vectors`


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The qkv product by the library, in the layout of x: (B, 3C, H, W).

    weight (3C, C) and bias (3C,) are of the dtype to compute in. Float32 follows PyTorch's setting for
    matrix products (`torch.set_float32_matmul_precision`), not that for convolutions.
    """
    b, c, height, width = x.shape
    if not _pixels_last(x):
        return _maps(F.linear(_rows(x, weight.dtype), weight, bias), x)
    maps = x.to(weight.dtype).contiguous().view(b, c, height * width)
    every = weight.expand(b, -1, -1)
    out = torch.bmm(every, maps) if bias is None else torch.baddbmm(bias[:, None], every, maps)
    return out.view(b, 3 * c, height, width)


class TritonPhases:
    """`kernels.Phases`; sums are float32 whatever goes in, maps are of the dtype computed in."""

    def project(self, x: Tensor, w: MixerWeights, dtype: torch.dtype) -> Projected:
        return Projected(product(x, *qkv_of(w, dtype)), vectors(w))

    def statistics(self, x: Tensor, qkv: Projected, w: MixerWeights) -> Tensor:
        c = x.shape[1]
        maps = maps_of(x, qkv.qkv.dtype)
        p = plan("statistics", maps)
        number = _empty(x, p.grid[0])
        partial = _empty(x, p.grid[0], 2, 2, c)
        result = _empty(x, 2, 2, c)
        launch(p, x, *qkv, number, partial)
        launch(plan("merge_statistics", maps), x, number, partial, result)
        return result

    def mix(
        self,
        x: Tensor,
        qkv: Projected,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Mixed:
        return mix(x, *qkv, statistics, eps, dtype)

    def backward_combine(
        self,
        grad: Tensor,
        x: Tensor,
        qkv: Projected,
        w: MixerWeights,
        spatial: Tensor,
        channel: Tensor,
    ) -> Combined:
        b, c, height, width = x.shape
        p = plan("backward_combine", maps_of(x, qkv.qkv.dtype))
        programs, blocks, _ = p.grid
        if grad.data_ptr() % ALIGNMENT:  # a part of a larger tensor
            grad = grad.clone()
        grad_qkv = torch.empty_like(qkv.qkv)
        grad_sum = empty_output(x, qkv.qkv.dtype)
        pixel = x.new_empty((blocks, b, 2, height, width), dtype=_small_dtype(qkv.qkv))
        channel_sum = _empty(x, p.parts, 2, b, c)
        weights = _empty(x, programs, 20 * c)
        results = (grad_qkv, grad_sum, pixel, channel_sum, weights)
        launch(p, x, grad, *qkv, spatial, channel, *results)
        dwc, dwc_bias, proj, proj_bias = weights.sum(0).split((9 * c, c, 9 * c, c))
        return Combined(
            grad_qkv,
            grad_sum,
            pixel.sum(0, dtype=torch.float32),
            channel_sum.sum(0),
            dwc.view(c, 1, 3, 3),
            dwc_bias,
            proj.view(c, 1, 3, 3),
            proj_bias,
        )

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
        c = x.shape[1]
        p = plan("backward_gate", maps_of(x, qkv.qkv.dtype))
        logit = torch.empty_like(spatial, dtype=_small_dtype(qkv.qkv))
        partial = _empty(x, p.grid[0], 2, 2, c)
        launch(p, x, *qkv, statistics, *eps, spatial, pixel, shift, logit, partial)
        sums = partial.sum(0)
        per_gate = qkv.vectors[: 26 * c].view(2, 13, c)
        norm_weight, norm_bias, to_logit = per_gate[:, 10:].unbind(1)
        # r is the norm's weight times n^ plus its bias where n > 0.
        of_logit = norm_weight * sums[:, 1] + norm_bias * sums[:, 0]
        return Gated(logit, of_logit, sums * to_logit[:, None])

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
        grad_qkv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        c = x.shape[1]
        p = plan("backward_depthwise", maps_of(x, qkv.qkv.dtype))
        weights = _empty(x, p.grid[0], 2, 10 * c)
        given = (*qkv, statistics, *eps, spatial, channel, shift, logit, coefficients, grad_sum)
        launch(p, x, *given, grad_qkv, weights)
        of_taps, of_bias = weights.sum(0).split((9 * c, c), 1)
        return of_taps.reshape(2, c, 3, 3), of_bias

    def project_backward(
        self, grad_qkv: Tensor, x: Tensor, w: MixerWeights, needed: tuple[bool, bool, bool]
    ) -> ProjectionGradients:
        need_x, need_weight, need_bias = needed
        b, c, height, width = x.shape
        weight = w.qkv_weight.flatten(1).to(grad_qkv.dtype)
        grad_x = grad_weight = grad_bias = None
        if need_bias:
            grad_bias = grad_qkv.sum((0, 2, 3), dtype=torch.float32)
        if need_weight:
            grad_weight = _weight_gradient(grad_qkv, x)
        if need_x and _pixels_last(x):
            maps = grad_qkv.view(b, 3 * c, height * width)
            grad_x = torch.bmm(weight.t().expand(b, -1, -1), maps).view(x.shape)
        elif need_x:
            grad_x = _maps(_rows(grad_qkv, grad_qkv.dtype) @ weight, x)
        return ProjectionGradients(grad_x, grad_weight, grad_bias)


def mix(
    x: Tensor,
    qkv: Tensor,
    vectors: Tensor,
    statistics: Tensor,
    eps: tuple[float, float],
    dtype: torch.dtype,
) -> Mixed:
    """`Phases.mix`: three launches."""
    maps = maps_of(x, qkv.dtype)
    b, c, height, width = maps.shape
    gates = plan("gates", maps)
    spatial = _empty(x, b, 2, height, width)
    partial = _empty(x, gates.parts, 2, b, c)
    launch(gates, x, qkv, vectors, statistics, *eps, spatial, partial)
    pooled, channel = _empty(x, 2, b, c), _empty(x, 2, b, c)
    launch(plan("channel_gates", maps), x, partial, vectors, pooled, channel)
    out = empty_output(x, dtype)
    launch(plan("combine", maps), x, qkv, vectors, spatial, channel, out)
    return Mixed(out, spatial, pooled, channel)


def infer(x: Tensor, packed: Packed, eps: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """x to out with running statistics: four launches."""
    if x.shape[0] == 0:
        return empty_output(x, dtype)
    qkv = product(x, packed.qkv_weight, packed.qkv_bias)
    return mix(x, qkv, packed.vectors, packed.statistics, eps, dtype).out


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(3C, C): that of the qkv product."""
    b, c, height, width = x.shape
    if _pixels_last(x) and c < height * width:
        maps = x.to(grad.dtype).contiguous().view(b, c, -1)
        return torch.bmm(grad.view(b, 3 * c, -1), maps.transpose(1, 2)).sum(0, dtype=torch.float32)
    # As many sums as images would be larger than the maps: rather turn these.
    return _rows(grad, grad.dtype).t() @ _rows(x, grad.dtype)


def _small_dtype(qkv: Tensor) -> torch.dtype:
    """Of the backward's maps of one channel: float16 would lack the range."""
    return torch.bfloat16 if qkv.dtype is torch.bfloat16 else torch.float32


def _pixels_last(x: Tensor) -> bool:
    return output_memory_format(x) is torch.contiguous_format


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B H W, C): a view of what is channels_last, else a copy."""
    return x.to(dtype).permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _maps(rows: Tensor, x: Tensor) -> Tensor:
    """(B, C, H, W) of rows of channels_last pixels."""
    b, _, height, width = x.shape
    return rows.view(b, height, width, -1).permute(0, 3, 1, 2)


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)
