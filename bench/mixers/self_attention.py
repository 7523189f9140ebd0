"""Multi-head self-attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .tokens import check_dim, to_map, to_tokens


class SelfAttention(nn.Module):
    """``softmax(q k^T / sqrt(C / heads)) v`` of every head, joined by a linear layer.

    Args:
        dim: channels C.
        heads: of as many channels each. Four divide every width of rcvit_xs.
        fused: whether PyTorch's `scaled_dot_product_attention` computes it, which never holds the N x N
            scores; else the formula as it stands, with them in memory.

    ``(B, C, H, W)`` in and out, a floating dtype; tokens are the N = H W pixels.

    Raises:
        ValueError: ``dim`` is no positive integer or no multiple of ``heads``.

    Source: ViT, arXiv 2010.11929, section 3.1 and appendix A.
    """

    def __init__(self, dim: int, heads: int = 4, fused: bool = False) -> None:
        super().__init__()
        check_dim(dim)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: expected a divisor of dim={dim}, got {heads}")
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        batch, count, dim = tokens.shape
        split = self.qkv(tokens).view(batch, count, 3, self.heads, dim // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, C / heads)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * (dim // self.heads) ** -0.5) @ k.transpose(-2, -1)
            mixed = scores.softmax(-1) @ v
        joined: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, count, dim))
        return to_map(joined, x)
