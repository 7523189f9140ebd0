"""The mixer on NVIDIA GPUs in bfloat16 and float16: the kernels of `csrc/cuda` behind a library product.

Two launches after the qkv product: spatial gates with the sums for the channel gates; then channel gates
and the rest. Training needs the batch statistics in front; the backward is three passes. The operators
are an argument, so that the emulation in tests/ runs everything here on CPU tensors.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import BackendUnavailable, get
from ...backends.cuda import channels_read
from ..tracing import is_opaque
from .autograd import mix_training
from .kernels import Combined, Gated, Mixed, Phases, ProjectionGradients
from .schema import Settings, empty_output, output_memory_format
from .triton import _phases as triton_phases
from .weights import MixerWeights, flatten

Shape = tuple[int, int, int, int]
_ALIGNMENT = 16  # bytes, of what kernels read


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

    def backward_fits(self, like: Tensor, shape: Shape) -> bool:
        """Whether the backward's kernels take maps of this shape on the device of `like`."""
        ...

    def pack_backward(
        self,
        w: MixerWeights,
        statistics: Tensor | None,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        """As `pack`; without statistics for `backward_combine` alone."""
        ...

    def backward_combine(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        channel: Tensor,
        grad: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From rows of the gradient, (B, H, W, P), to those at qkv (v's part alone) and at a.

        Then to be summed over the first dimension: by pixel (n, B, 2, H, W), by channel (n, 2, B, P),
        weights (n, 20, P): dwc's taps and bias, proj's taps and bias.
        """
        ...

    def backward_gate(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        pixel: Tensor,
        shift: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor]:
        """es, (B, 2, H, W), and to be summed (n, 2, 2, P): sums of es and of es n^ where n > 0."""
        ...

    def backward_depthwise(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        logit: Tensor,
        channel: Tensor,
        shift: Tensor,
        coefficients: Tensor,
        grad_sum: Tensor,
        grad_qkv: Tensor,
        shape: Shape,
    ) -> Tensor:
        """Fills in the parts of q and k; to be summed (n, 2, 10, P): taps and bias of q and k."""
        ...


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

    def backward_fits(self, like: Tensor, shape: Shape) -> bool:
        found: bool = torch.ops.casvit_kernels.cuda_backward_fits(like, shape)
        return found

    def pack_backward(
        self,
        w: MixerWeights,
        statistics: Tensor | None,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        ops = torch.ops.casvit_kernels
        out: Tensor = ops.cuda_pack_backward(*flatten(w), *eps, statistics, dtype)
        return out

    def backward_combine(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        channel: Tensor,
        grad: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ops = torch.ops.casvit_kernels
        grad_qkv, grad_sum, pixel, sums, weights = ops.cuda_backward_combine(
            rows, packed, spatial, channel, grad, shape
        )
        return grad_qkv, grad_sum, pixel, sums, weights

    def backward_gate(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        pixel: Tensor,
        shift: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor]:
        ops = torch.ops.casvit_kernels
        logit, sums = ops.cuda_backward_gate(rows, packed, spatial, pixel, shift, shape)
        return logit, sums

    def backward_depthwise(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        logit: Tensor,
        channel: Tensor,
        shift: Tensor,
        coefficients: Tensor,
        grad_sum: Tensor,
        grad_qkv: Tensor,
        shape: Shape,
    ) -> Tensor:
        out: Tensor = torch.ops.casvit_kernels.cuda_backward_depthwise(
            rows,
            packed,
            spatial,
            logit,
            channel,
            shift,
            coefficients,
            grad_sum,
            grad_qkv,
            shape,
        )
        return out


class Packed(NamedTuple):
    """A mixer's weights for inference."""

    qkv_weight: Tensor  # (3P, C), of the dtype computed in
    qkv_bias: Tensor | None  # (3P,)
    words: Tensor  # what `Operators.pack` returns


class Projected:
    """qkv as rows, and what the phases of one backward hand on to each other."""

    def __init__(self, x: Tensor, w: MixerWeights, dtype: torch.dtype) -> None:
        self._given = (x, w, dtype)
        self.packed: Tensor | None = None  # from backward_gate to backward_depthwise
        self.adopted: Any = None  # what another backend's phases take instead

    @functools.cached_property
    def rows(self) -> Tensor:
        x, w, dtype = self._given
        return product(x, *padded_product(w, dtype))


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
    """qkv with channels innermost whatever x's layout is; either is a plain GEMM.

    With a bias x is turned: `linear` of a transposed view would add it after rounding.
    """
    x = x.to(weight.dtype)
    if bias is not None or output_memory_format(x) is torch.channels_last:
        return F.linear(x.permute(0, 2, 3, 1).contiguous(), weight, bias)
    return F.linear(x.contiguous().flatten(2).transpose(1, 2), weight, bias)


class CudaPhases:
    """`kernels.Phases`. Maps too wide for the backward's tiles go through Triton's."""

    def __init__(self, operators: Operators) -> None:
        self._operators = operators

    def project(self, x: Tensor, w: MixerWeights, dtype: torch.dtype) -> Projected:
        return Projected(x, w, dtype)

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
        if not self._operators.backward_fits(x, _shape(x)):
            qkv.adopted = _adopt(qkv.rows, x, w)
            return _triton().backward_combine(grad, x, qkv.adopted, w, spatial, channel)
        c, rows = x.shape[1], qkv.rows
        packed = self._operators.pack_backward(w, None, (0.0, 0.0), rows.dtype)
        grad_qkv, grad_sum, pixel, sums, weights = self._operators.backward_combine(
            rows, packed, spatial, channel, gradient_rows(grad, rows.dtype), _shape(x)
        )
        of = weights.sum(0)[:, :c]
        return Combined(
            grad_qkv.flatten(1, 2),  # three dimensions: Triton's has four
            grad_sum,
            pixel.sum(0),
            sums.sum(0)[..., :c].contiguous(),
            of[:9].t().contiguous().view(c, 1, 3, 3),
            of[9].contiguous(),
            of[10:19].t().contiguous().view(c, 1, 3, 3),
            of[19].contiguous(),
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
        if qkv.adopted is not None:
            return _triton().backward_gate(
                x, qkv.adopted, w, statistics, eps, spatial, pixel, shift
            )
        c, rows = x.shape[1], qkv.rows
        qkv.packed = self._operators.pack_backward(w, statistics, eps, rows.dtype)
        logit, partial = self._operators.backward_gate(
            rows, qkv.packed, spatial, pixel, shift, _shape(x)
        )
        sums = partial.sum(0)[..., :c]
        of_logit, to_logit = [], []
        for gate, (plain, weighted) in zip((w.q, w.k), sums, strict=True):
            # r is the norm's weight times n^ plus its bias where n > 0.
            by_weight = weighted if gate.norm_weight is None else weighted * gate.norm_weight
            of_logit.append(
                by_weight if gate.norm_bias is None else by_weight + plain * gate.norm_bias
            )
            to_logit.append(gate.spatial_weight.flatten().float())
        return Gated(logit, torch.stack(of_logit), sums * torch.stack(to_logit)[:, None])

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
        if qkv.adopted is not None:
            return _triton().backward_depthwise(
                x,
                qkv.adopted,
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
        c = x.shape[1]
        assert qkv.packed is not None  # backward_gate comes first
        of = self._operators.backward_depthwise(
            qkv.rows,
            qkv.packed,
            spatial,
            logit,
            channel,
            shift,
            coefficients,
            grad_sum,
            grad_qkv,
            _shape(x),
        ).sum(0)[..., :c]
        taps = of[:, :9].transpose(1, 2).contiguous().view(2, c, 3, 3)
        return taps, of[:, 9].contiguous()

    def project_backward(
        self, grad_qkv: Tensor, x: Tensor, w: MixerWeights, needed: tuple[bool, bool, bool]
    ) -> ProjectionGradients:
        if grad_qkv.dim() == 4:
            return _triton().project_backward(grad_qkv, x, w, needed)
        return project_backward(grad_qkv, x, w, needed)


def gradient_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, P) of a map (B, C, H, W): a view where it is channels_last and C a multiple of 4."""
    c = grad.shape[1]
    pixels = grad.to(dtype).permute(0, 2, 3, 1)
    more = channels_read(c) - c
    rows = F.pad(pixels, (0, more)) if more else pixels
    rows = rows.contiguous()
    return rows if rows.data_ptr() % _ALIGNMENT == 0 else rows.clone()


def project_backward(
    rows: Tensor, x: Tensor, w: MixerWeights, needed: tuple[bool, bool, bool]
) -> ProjectionGradients:
    """The gradients of `product`, of rows (B, H W, 3P) of the gradient at qkv."""
    need_x, need_weight, need_bias = needed
    b, c, height, width = x.shape
    grad_x = grad_weight = grad_bias = None
    if need_bias:
        grad_bias = rows.sum((0, 1), dtype=torch.float32).view(3, -1)[:, :c].reshape(-1)
    if need_weight:
        # As many sums as images would be larger than small maps: rather turn these.
        if _channels_last(x) or height * width <= c:
            pixels = x.to(rows.dtype).permute(0, 2, 3, 1).reshape(-1, c)
            grad_weight = rows.flatten(0, 1).t() @ pixels
        else:
            maps = x.to(rows.dtype).contiguous().view(b, c, -1)
            grad_weight = torch.bmm(rows.transpose(1, 2), maps.transpose(1, 2))
            grad_weight = grad_weight.sum(0, dtype=torch.float32)
        grad_weight = grad_weight.view(3, -1, c)[:, :c].reshape(3 * c, c)
    if need_x:
        weight = padded_product(w, rows.dtype)[0]
        if _channels_last(x):
            maps = (rows.flatten(0, 1) @ weight).view(b, height, width, c)
            grad_x = maps.permute(0, 3, 1, 2)
        else:
            turned = weight.t().expand(b, -1, -1)
            grad_x = torch.bmm(turned, rows.transpose(1, 2)).view(x.shape)
    return ProjectionGradients(grad_x, grad_weight, grad_bias)


class CudaKernels:
    """`kernels.MixerKernels` on any `Operators`."""

    def __init__(self, name: str, operators: Operators) -> None:
        self.name = name
        self._operators = operators

    @functools.cached_property
    def phases(self) -> Phases:
        return CudaPhases(self._operators)

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


def _triton() -> Phases:
    """Triton's phases; imports triton.

    Raises:
        BackendUnavailable: there is none.
    """
    reason = get("triton").why_not()
    if reason is not None:
        raise BackendUnavailable(
            "maps this wide, or of this many channels, take Triton's kernels in the backward of 'cuda', "
            f"and there are none: {reason}"
        )
    phases: Phases = triton_phases().TritonPhases()
    return phases


def _adopt(rows: Tensor, x: Tensor, w: MixerWeights) -> Any:
    """What Triton's `project` would return, of the very q, k and v that the forward has computed.

    A product of its own may round another way: a ReLU that was open in the forward would be shut.
    """
    b, c, height, width = x.shape
    maps = rows.view(b, height, width, 3, -1)[..., :c].flatten(3).permute(0, 3, 1, 2)
    maps = maps.contiguous(memory_format=output_memory_format(x))
    return triton_phases().Projected(maps, triton_phases().vectors(w))


def _differentiates(x: Tensor, w: MixerWeights) -> bool:
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *flatten(w))
    )


def _channels_last(x: Tensor) -> bool:
    return output_memory_format(x) is torch.channels_last


def _shape(x: Tensor) -> Shape:
    b, c, height, width = x.shape
    return b, c, height, width
