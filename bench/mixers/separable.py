"""Separable self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from .tokens import check_dim


class SeparableSelfAttention(nn.Module):
    """``((sum_n softmax_n(x W_I) x W_K) * relu(x W_V)) W_O``: one context vector, linear in N.

    Args:
        dim: channels C.

    ``(B, C, H, W)`` in and out, a floating dtype. The softmax is over all N = H W pixels, as section 3.2
    has it; the network of that paper first unfolds its maps and takes it over patches, for each pixel of
    a patch. Linear layers are 1x1 convolutions on the map, as published.

    Raises:
        ValueError: ``dim`` is no positive integer.

    Source: MobileViTv2, arXiv 2206.02680, section 3.2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_dim(dim)
        self.dim = dim
        self.qkv = nn.Conv2d(dim, 1 + 2 * dim, 1)  # W_I, W_K, W_V in one product
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        latent, key, value = self.qkv(x).split([1, self.dim, self.dim], 1)
        scores = latent.flatten(2).softmax(-1)  # (B, 1, N)
        context = key.flatten(2) @ scores.transpose(1, 2)  # (B, C, 1)
        out: Tensor = self.proj(value.relu() * context[..., None])
        return out
