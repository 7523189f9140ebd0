"""Efficient additive attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tokens import check_dim, to_map, to_tokens


class EfficientAdditiveAttention(nn.Module):
    """``q^ + T(k^ * sum_n a_n q^_n)``, with ``a`` from ``q^ w / sqrt(C)``: one global query, no values.

    Args:
        dim: channels C.

    ``(B, C, H, W)`` in and out, a floating dtype; tokens are the N = H W pixels. ``q^`` and ``k^`` are
    queries and keys of length 1, ``a`` has length 1 over the tokens. A linear layer stands behind the
    sum, as in the paper's Figure 2 (d) and its published code.

    Raises:
        ValueError: ``dim`` is no positive integer.

    Source: SwiftFormer, arXiv 2303.15446, section 3.2, equations 3 to 5.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_dim(dim)
        self.scale = dim**-0.5
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.weight = nn.Parameter(torch.randn(dim, 1))  # the paper's w_a
        self.transform = nn.Linear(dim, dim)  # the paper's T
        self.final = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        query = F.normalize(self.query(tokens), dim=-1)
        key = F.normalize(self.key(tokens), dim=-1)
        attention = F.normalize(query @ self.weight * self.scale, dim=1)  # (B, N, 1)
        whole = attention.transpose(1, 2) @ query  # (B, 1, C)
        out: Tensor = self.final(self.transform(key * whole) + query)
        return to_map(out, x)
