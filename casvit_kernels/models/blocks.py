"""The blocks of the RCViT networks: local integration, token mixer, Mlp; and the downsampling.

Source: CAS-ViT, arXiv 2408.03703, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ..ops.tracing import exporting


class DropPath(nn.Module):
    """Stochastic depth: in training drops a whole sample with probability `rate`, scales the rest.

    Source: arXiv 1603.09382. Any shape with the batch first, in and out.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep if keep > 0.0 else mask)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Embedding(nn.Module):
    """Downsampling between stages: ``(B, C, H, W)`` to ``(B, out, ceil(H/2), ceil(W/2))``."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, out_chans, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x))
        return out


class LocalIntegration(nn.Module):
    """1x1, BatchNorm, depthwise 3x3, GELU, 1x1; ``(B, C, H, W)`` in and out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(dim, dim, 1),
            nn.BatchNorm2d(dim),
            nn.Conv2d(dim, dim, 3, 1, 1, groups=dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


class Mlp(nn.Module):
    """1x1 to ratio * C, GELU, 1x1 back, dropout after both; ``(B, C, H, W)`` in and out."""

    def __init__(self, dim: int, ratio: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, ratio * dim, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(ratio * dim, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class AdditiveBlock(nn.Module):
    """Local integration, token mixer and Mlp, each with a residual; ``(B, C, H, W)`` in and out.

    Args:
        dim: channels C.
        mixer: makes the token mixer for C channels, here so that random draws keep their order.
        drop: dropout probability in the Mlp.
        drop_path: probability of dropping the mixer's and the Mlp's branch of a sample.

    With ``grad_checkpointing`` (see `RCViT.set_grad_checkpointing`) the backward computes the block
    again instead of keeping its activations.
    """

    grad_checkpointing = False

    def __init__(
        self, dim: int, mixer: Callable[[int], nn.Module], drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.local_perception = LocalIntegration(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = mixer(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled() and not _recorded(x):
            return self._checkpointed(x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        x = x + self.local_perception(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def _checkpointed(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # recomputes products only, never a write to a buffer
            out: Tensor = checkpoint(self._compute, x, use_reentrant=False)
            return out

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _KeptStatistics(self)

        out = checkpoint(self._compute, x, use_reentrant=False, context_fn=contexts)
        return out


class _KeptStatistics(AbstractContextManager[None]):
    """Inside, the training BatchNorms of a module write their statistics into copies.

    `torch.utils.checkpoint` alone runs a block twice in a step, and each run moves the running
    statistics and counts a batch. The copies have the same shapes, so that the recomputation saves
    for the backward what the first run did. Entered once for each backward through the block.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept: list[tuple[nn.Module, dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        for module in self._module.modules():
            if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
                buffers = module._buffers
                self._kept.append((module, dict(buffers)))
                buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *error: object) -> None:
        while self._kept:
            module, buffers = self._kept.pop()
            module._buffers.update(buffers)


def _recorded(x: Tensor) -> bool:
    """Whether the call is recorded into a graph, which is to hold plain operations."""
    return isinstance(x, fx.Proxy) or exporting()
