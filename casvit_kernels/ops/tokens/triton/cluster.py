"""The two kernels of an iteration of token clustering, a program for a cell or for a centre of one map.

Affinities are made where a cell's tokens and the window's centres meet; then each centre sums up its
window's tokens in a fixed order. No atomics: bits repeat, whatever else is in the batch.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cells import Cells, Size, cells
from ..reference import pooled, wide


@triton.jit
def affinity_kernel(
    x,
    centres,  # (B, K, C) float32
    tokens,  # (K, M) int32; as cells.Cells, from here down
    filled,
    around,  # (K, J)
    inside,
    affinity,  # (B, N, J) float32
    stride_b,
    stride_n,
    stride_c,
    temperature,
    N,
    K,
    C: tl.constexpr,
    M: tl.constexpr,
    M_BLOCK: tl.constexpr,
    J: tl.constexpr,
    J_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    cell, image = tl.program_id(0) % K, (tl.program_id(0) // K).to(tl.int64)
    m, j = tl.arange(0, M_BLOCK), tl.arange(0, J_BLOCK)
    token = tl.load(tokens + cell * M + m, mask=m < M, other=0)
    there = tl.load(filled + cell * M + m, mask=m < M, other=0) != 0
    other = tl.load(around + cell * J + j, mask=j < J, other=0)
    counts = tl.load(inside + cell * J + j, mask=j < J, other=0) != 0
    rows = x + image * stride_b + token.to(tl.int64) * stride_n
    dot = tl.zeros((M_BLOCK, J_BLOCK), tl.float32)
    square = tl.zeros((J_BLOCK,), tl.float32)
    for c0 in range(0, C, C_BLOCK):
        c = c0 + tl.arange(0, C_BLOCK)
        in_row = c < C
        # Around the home centre, whose distance the softmax takes out: large tokens do not cancel.
        home = tl.load(centres + (image * K + cell) * C + c, mask=in_row, other=0.0)
        own = tl.load(
            rows[:, None] + c[None, :] * stride_c, mask=there[:, None] & in_row[None, :], other=0.0
        ).to(tl.float32)
        near = tl.load(
            centres + (image * K + other[:, None]) * C + c[None, :],
            mask=counts[:, None] & in_row[None, :],
            other=0.0,
        )
        own = tl.where(in_row[None, :], own - home[None, :], 0.0)
        near = tl.where(in_row[None, :], near - home[None, :], 0.0)
        dot += tl.sum(own[:, None, :] * near[None, :, :], 2)
        square += tl.sum(near * near, 1)
    logits = temperature * (2.0 * dot - square[None, :])
    logits = tl.where(counts[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    to = affinity + (image * N + token[:, None]) * J + j[None, :]
    tl.store(to, weights, mask=there[:, None] & (j < J)[None, :])


@triton.jit
def centres_kernel(
    x,
    affinity,
    tokens,
    filled,
    around,
    inside,
    centres,  # (B, K, C) float32, replaced
    stride_b,
    stride_n,
    stride_c,
    N,
    K,
    C: tl.constexpr,
    M: tl.constexpr,
    M_BLOCK: tl.constexpr,
    J: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    centre, image = tl.program_id(0) % K, (tl.program_id(0) // K).to(tl.int64)
    c = tl.program_id(1) * C_BLOCK + tl.arange(0, C_BLOCK)
    m = tl.arange(0, M_BLOCK)
    in_row = c < C
    total = 0.0
    out = tl.zeros((C_BLOCK,), tl.float32)
    for j in range(J):
        # A cell at place j of this window has this centre at the opposite place of its own.
        if tl.load(inside + centre * J + j) != 0:
            cell = tl.load(around + centre * J + j)
            token = tl.load(tokens + cell * M + m, mask=m < M, other=0)
            there = tl.load(filled + cell * M + m, mask=m < M, other=0) != 0
            weights = tl.load(
                affinity + (image * N + token) * J + (J - 1 - j), mask=there, other=0.0
            )
            own = tl.load(
                x
                + image * stride_b
                + token[:, None].to(tl.int64) * stride_n
                + c[None, :] * stride_c,
                mask=there[:, None] & in_row[None, :],
                other=0.0,
            ).to(tl.float32)
            total += tl.sum(weights, 0)
            out += tl.sum(weights[:, None] * own, 0)
    at = centres + (image * K + centre) * C + c
    before = tl.load(at, mask=in_row, other=0.0)
    # A centre that no token has any affinity to stays where it is; so does one whose sum is NaN.
    tl.store(at, tl.where(total > 0.0, out / total, before), mask=in_row)


def cluster(
    x: Tensor, size: Size, grid: Size, iterations: int, window: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `local.cluster`."""
    at = Cells(*(t.to(torch.int32).contiguous() for t in cells(size, grid, window, x.device)))
    centres = pooled(x, size, grid).contiguous()
    b, n, channels = x.shape
    k, m = at.tokens.shape
    j = at.around.shape[1]
    if iterations == 0 or b == 0:
        inside = at.inside[at.home.long()].to(centres.dtype)
        return centres.to(x.dtype), inside.expand(b, -1, -1).contiguous()
    affinity = torch.empty(b, n, j, dtype=wide(x[:0]).dtype, device=x.device)
    m_block = triton.next_power_of_2(m)
    j_block = triton.next_power_of_2(j)
    # As many channels at a time as make 8192 products.
    c_block = max(16, min(triton.next_power_of_2(channels), 8192 // (m_block * j_block)))
    wide_block = min(256, triton.next_power_of_2(channels))
    tables = (at.tokens, at.filled, at.around, at.inside)
    # Triton launches on the current device: make it that of x.
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with device:
        for _ in range(iterations):
            affinity_kernel[(k * b,)](
                x, centres, *tables, affinity, *x.stride(), temperature, n, k,
                C=channels, M=m, M_BLOCK=m_block, J=j, J_BLOCK=j_block, C_BLOCK=c_block,
            )  # fmt: skip
            centres_kernel[(k * b, triton.cdiv(channels, wide_block))](
                x, affinity, *tables, centres, *x.stride(), n, k,
                C=channels, M=m, M_BLOCK=m_block, J=j, C_BLOCK=wide_block,
            )  # fmt: skip
    return centres.to(x.dtype), affinity
