"""CATM in plain PyTorch: the ground truth of every test and what exports trace.

May import: torch, `weights.py`; nothing else of this package.
Source: CAS-ViT, arXiv 2408.03703, section 3.2; the order of operations follows the published code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import GateWeights, MixerWeights

Norm = Callable[[Tensor], Tensor]


def depthwise3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise 3x3 convolution, stride 1, zero padding 1."""
    return F.conv2d(x, weight, bias, padding=1, groups=weight.shape[0])


def gate(z: Tensor, w: GateWeights, norm: Norm) -> Tensor:
    """Spatial gate, then channel gate: ``z * sigmoid(spatial) * sigmoid(channel)``."""
    hidden = F.relu(norm(depthwise3x3(z, w.depthwise_weight, w.depthwise_bias)))
    z = z * torch.sigmoid(F.conv2d(hidden, w.spatial_weight))
    pooled = F.adaptive_avg_pool2d(z, (1, 1))
    return z * torch.sigmoid(F.conv2d(pooled, w.channel_weight))


def catm(x: Tensor, w: MixerWeights, norm_q: Norm, norm_k: Norm) -> Tensor:
    """The convolutional additive token mixer, without its dropout.

    Args:
        x: ``(B, C, H, W)``, any floating dtype, any strides.
        w: the weights, same dtype and device as ``x`` (or under autocast).
        norm_q, norm_k: the BatchNorm of each gate, as a module or a function.

    Returns:
        ``(B, C, H, W)``.
    """
    q, k, v = F.conv2d(x, w.qkv_weight, w.qkv_bias).chunk(3, dim=1)
    mixed = depthwise3x3(gate(q, w.q, norm_q) + gate(k, w.k, norm_k), w.dwc_weight, w.dwc_bias)
    return depthwise3x3(mixed * v, w.proj_weight, w.proj_bias)


def running_norm(w: GateWeights, eps: float) -> Norm:
    """The gate's BatchNorm with its running statistics, as a function."""
    if w.norm_mean is None or w.norm_var is None:
        raise ValueError("norm: expected running statistics (norm_mean and norm_var), got None")
    mean, var = w.norm_mean, w.norm_var

    def norm(d: Tensor) -> Tensor:
        return F.batch_norm(d, mean, var, w.norm_weight, w.norm_bias, False, 0.0, eps)

    return norm


def formula_norm(w: GateWeights, eps: float, batch: bool, momentum: float = 0.0) -> Norm:
    """The gate's BatchNorm as a function; with batch statistics it updates the running ones."""
    if not batch:
        return running_norm(w, eps)

    def norm(d: Tensor) -> Tensor:
        mean, var = w.norm_mean, w.norm_var
        return F.batch_norm(d, mean, var, w.norm_weight, w.norm_bias, True, momentum, eps)

    return norm


class SpatialOperation(nn.Module):
    """Spatial gate ``x * sigmoid(conv1x1(relu(BN(dwconv3x3(x)))))``; ``(B, C, H, W)`` in and out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 1, 1, groups=dim),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim, 1, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.block(x)
        return x * gate


class ChannelOperation(nn.Module):
    """Channel gate ``x * sigmoid(conv1x1(mean_hw(x)))``; ``(B, C, H, W)`` in and out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(dim, dim, 1, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.block(x)
        return x * gate


class AdditiveTokenMixer(nn.Module):
    """The published mixer, unfused: same constructor, keys, order and initialisation.

    Args:
        dim: channels C, at least 1.
        attn_bias: whether the qkv projection has a bias.
        proj_drop: dropout probability after the output projection.

    Raises:
        ValueError: ``dim`` is not a positive integer or ``proj_drop`` is not in [0, 1].
    """

    def __init__(self, dim: int = 512, attn_bias: bool = False, proj_drop: float = 0.0) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim <= 0:
            raise ValueError(f"dim: expected a positive integer, got {dim!r}")
        if not 0.0 <= proj_drop <= 1.0:
            raise ValueError(f"proj_drop: expected a probability in [0, 1], got {proj_drop!r}")
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=attn_bias)
        self.oper_q = nn.Sequential(SpatialOperation(dim), ChannelOperation(dim))
        self.oper_k = nn.Sequential(SpatialOperation(dim), ChannelOperation(dim))
        self.dwc = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H, W)``."""
        q, k, v = self.qkv(x).chunk(3, dim=1)
        mixed: Tensor = self.dwc(self.oper_q(q) + self.oper_k(k))
        out: Tensor = self.proj_drop(self.proj(mixed * v))
        return out
