"""The contract that a backend fills for the mixer; all that a new backend has to read.

`MixerKernels` is what dispatch calls; `Phases` the pieces of a training step that `training.py` joins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .weights import MixerWeights


class MixerKernels(Protocol):
    """One backend's mixer."""

    name: str  #: the backend's

    @property
    def phases(self) -> Phases | None:
        """Training, or None where it runs the reference formulas."""
        ...

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> Any:
        """The weights folded and laid out for `project_and_mix`, worth keeping between calls, or None.

        A tensor starts with the header of csrc/cpu/pack.h, in which a kernel notes that it is stale.
        """
        ...

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Any
    ) -> Tensor:
        """x to out with BatchNorm's running statistics, differentiable.

        packed: None, or what `pack` made of this very `w` and `eps`, whose tensors are where they were
        (`packed.py` sees to it): a kernel may read them there again.
        """
        ...


class Mixed(NamedTuple):
    """What the forward of a training step gives, and keeps."""

    out: Tensor  #: (B, C, H, W)
    spatial: Tensor  #: (B, 2, H, W) s, the spatial gates of q and k
    pooled: Tensor  #: (2, B, C) mean of z s over the pixels
    channel: Tensor  #: (2, B, C) g, the channel gates


class Combined(NamedTuple):
    """The backward as far as the gradient at the sum of q and k, and those of what lies behind."""

    grad_qkv: Tensor  #: the backend's own layout; the part of v is filled in
    grad_sum: Tensor  #: the backend's own layout; ga, the gradient at a
    pixel: Tensor  #: (B, 2, H, W) sum over c of ga g z, or the backend's own terms of it
    channel: Tensor  #: (2, B, C) sum over the pixels of ga z s
    dwc_weight: Tensor  #: (C, 1, 3, 3) gradient
    dwc_bias: Tensor  #: (C,) gradient
    proj_weight: Tensor  #: (C, 1, 3, 3) gradient
    proj_bias: Tensor  #: (C,) gradient


class Gated(NamedTuple):
    """The backward through the gates, as far as BatchNorm."""

    logit: Tensor  #: (B, 2, H, W) es, the gradient at the spatial gate's logit; the backend's dtype
    spatial_weight: Tensor  #: (2, C) sum of es r
    sums: Tensor  #: (2, 2, C) [gate][sum of gn, sum of gn n^]


class ProjectionGradients(NamedTuple):
    """None where not needed; the weights' contiguous."""

    x: Tensor | None  #: (B, C, H, W), in the memory format of `Mixed.out`
    qkv_weight: Tensor | None  #: (3C, C)
    qkv_bias: Tensor | None  #: (3C,)


class Phases(Protocol):
    """Training, in the pieces that `training.py` joins.

    For z in {q, k}: d = depthwise convolution of z; n^ = (d - mean) / sqrt(var + eps);
    n = norm_weight n^ + norm_bias; r = relu(n); s = sigmoid(sum over c of spatial_weight r);
    g = sigmoid(channel_weight @ mean(z s)). Then a = sum over q, k of z s g; l = dwc(a);
    out = proj(l v). (Paper: arXiv 2408.03703, section 3.2.)

    Tensors named in the tuples above are float32 and contiguous but for `out`, which has `dtype` and
    the memory format `schema.output_memory_format(x)`; so are statistics, shift and coefficients.
    `qkv` is what the backend likes; `grad_sum` and `grad_qkv` have what layout and dtype it likes.
    x and the weights come as the user has them, of any dtype and strides; B, C, H and W are at least
    1. `norm_mean` and `norm_var` may be None: `statistics` says what to use. Equal inputs give equal
    bits.
    """

    def project(self, x: Tensor, w: MixerWeights, dtype: torch.dtype) -> Any:
        """qkv; the product's operands are rounded to `dtype`, its sums are float32."""
        ...

    def statistics(self, x: Tensor, qkv: Any, w: MixerWeights) -> Tensor:
        """(2, 2, C): of q and k, mean and biased variance of d over images and pixels."""
        ...

    def mix(
        self,
        x: Tensor,
        qkv: Any,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Mixed:
        """From qkv and the statistics of the q and k gates to out."""
        ...

    def backward_combine(
        self,
        grad: Tensor,
        x: Tensor,
        qkv: Any,
        w: MixerWeights,
        spatial: Tensor,
        channel: Tensor,
    ) -> Combined:
        """From the gradient at out (in the memory format of out) to that at a and at v."""
        ...

    def backward_gate(
        self,
        x: Tensor,
        qkv: Any,
        w: MixerWeights,
        statistics: Tensor,
        eps: tuple[float, float],
        spatial: Tensor,
        pixel: Tensor,
        shift: Tensor,
    ) -> Gated:
        """es = (pixel + sum over c of shift z) s (1 - s); gn = es spatial_weight where n > 0.

        shift: (2, B, C), the gradient at the pooled mean, divided by H W.
        """
        ...

    def backward_depthwise(
        self,
        x: Tensor,
        qkv: Any,
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
        """Fill the parts of q and k in grad_qkv: (ga g + shift) s + transposed convolution of gd.

        coefficients: (2, 3, C); gd, the gradient at d, is c0 gn + c1 + c2 n^.

        Returns:
            Gradients of the depthwise weights (2, C, 3, 3) and biases (2, C).
        """
        ...

    def project_backward(
        self, grad_qkv: Any, x: Tensor, w: MixerWeights, needed: tuple[bool, bool, bool]
    ) -> ProjectionGradients:
        """Those of the gradients that are needed, in any dtype: they are rounded afterwards."""
        ...


class WholeStep(ABC):
    """What phases may be, too: each way in one call, for steps that no process group interrupts.

    Worth it where a call costs as much as a phase. B is at least 1; otherwise as `Phases`.
    """

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        w: MixerWeights,
        eps: tuple[float, float],
        batch: tuple[bool, bool],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """out, statistics that were used (batch: whether those of x), spatial, pooled, channel."""

    @abstractmethod
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
        """The gradients that are needed of x and the flat weights, in any dtype.

        small: what `forward` returned after out.
        """


_TABLE: dict[str, MixerKernels] = {}


def register(kernels: MixerKernels) -> None:
    """Enter a backend's kernels; `dispatch.py` does it for all of them."""
    _TABLE[kernels.name] = kernels


def get(backend: str) -> MixerKernels:
    """The kernels of a backend by its name: operators know it as a string.

    Raises:
        RuntimeError: the backend has no kernels for the mixer.
    """
    if backend not in _TABLE:
        raise RuntimeError(f"backend={backend!r} has no kernels for the mixer")
    return _TABLE[backend]


def phases(backend: str) -> Phases:
    """The training kernels of a backend.

    Raises:
        RuntimeError: it has none.
    """
    found = get(backend).phases
    if found is None:
        raise RuntimeError(f"backend={backend!r} has no training kernels")
    return found
