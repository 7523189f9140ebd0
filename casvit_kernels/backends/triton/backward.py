"""Kernels of the backward: B1 (combination), B2 (spatial gate), B3 (depthwise convolution).

The symbols are those of `backends.base.Phases`; layouts, dtypes and run-time values as in `forward`.
Weight gradients pair a pixel's own value with the neighbours of the other factor, so that each pair is
counted once; every program writes sums of its own, which are added afterwards in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import RUN_TIME
from .tile import (
    by_channel,
    by_pixel,
    convolve_back_row,
    convolve_row,
    limit,
    maps,
    offsets,
    over_channels,
    over_pixels,
    place,
    row_offset,
    sides,
    store_per_image,
    taps,
    vector,
    wide,
    work,
    zeros,
)


@triton.jit
def nine_zeros(TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    z = zeros(TW, BC, PIXELS_LAST)
    return z, z, z, z, z, z, z, z, z


@triton.jit
def store_taps(pointer, sums, channel, C: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """The lanes' sums for nine weights, to (C, 9)."""
    p, there = pointer + channel * 9, channel < C
    tl.store(p, over_pixels(sums[0], PIXELS_LAST), there)
    tl.store(p + 1, over_pixels(sums[1], PIXELS_LAST), there)
    tl.store(p + 2, over_pixels(sums[2], PIXELS_LAST), there)
    tl.store(p + 3, over_pixels(sums[3], PIXELS_LAST), there)
    tl.store(p + 4, over_pixels(sums[4], PIXELS_LAST), there)
    tl.store(p + 5, over_pixels(sums[5], PIXELS_LAST), there)
    tl.store(p + 6, over_pixels(sums[6], PIXELS_LAST), there)
    tl.store(p + 7, over_pixels(sums[7], PIXELS_LAST), there)
    tl.store(p + 8, over_pixels(sums[8], PIXELS_LAST), there)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_combine_kernel(
    grad,  # (B, C, H, W), at out
    qkv,  # (B, 3C, H, W)
    vectors,
    spatial,  # (B, 2, H, W) float32: s
    gates,  # (2, B, C) float32: g
    grad_qkv,  # (B, 3C, H, W); the part of v is written
    grad_sum,  # (B, C, H, W): ga
    pixel,  # (channel blocks, B, 2, H, W) float32: sums of ga g z over the channels of a block
    channel_sum,  # (parts, 2, B, C) float32: sums of ga z s
    weights,  # (programs, 20C) float32: gradients of dwc (C, 9), its bias, proj (C, 9), its bias
    B,
    H,
    W,
    rows,
    repeat,
    C: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """B1. Row h of the gradient and of q and k come in; u and gh follow at row h-1, ga at h-2."""
    group, until, tile, first, last, part = work(B, H, W, rows, repeat, TW, 2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    there = by_channel(channel < C, PIXELS_LAST)
    dwc = taps(vectors + 26 * C, channel, C, PIXELS_LAST)
    dwc_bias = vector(vectors + 35 * C, channel, C, PIXELS_LAST)
    proj = taps(vectors + 36 * C, channel, C, PIXELS_LAST)
    of_dwc = nine_zeros(TW, BC, PIXELS_LAST)
    of_proj = nine_zeros(TW, BC, PIXELS_LAST)
    of_dwc_bias = zeros(TW, BC, PIXELS_LAST)
    of_proj_bias = zeros(TW, BC, PIXELS_LAST)
    for g in range(group, until):
        image, column, own = place(g, tile, B, W, TW, 2)
        grad_at = grad + offsets(image, column, channel, H, W, C, PIXELS_LAST)
        q_at = qkv + offsets(image, column, channel, H, W, 3 * C, PIXELS_LAST)
        k_at = qkv + offsets(image, column, C + channel, H, W, 3 * C, PIXELS_LAST)
        v_offset = offsets(image, column, 2 * C + channel, H, W, 3 * C, PIXELS_LAST)
        sum_at = grad_sum + offsets(image, column, channel, H, W, C, PIXELS_LAST)
        s_offset = maps(image, H, W, 2, 0) + column
        s_at = spatial + s_offset
        pixel_at = pixel + wide(tl.program_id(1)) * B * 2 * H * W + s_offset
        of_image = by_pixel(image.to(tl.int64) * C, PIXELS_LAST) + by_channel(channel, PIXELS_LAST)
        known = by_pixel(column >= 0, PIXELS_LAST) & there
        gate_q = tl.load(gates + of_image, known, 0.0)
        gate_k = tl.load(gates + wide(B) * C + of_image, known, 0.0)
        hidden_above = zeros(TW, BC, PIXELS_LAST)
        hidden_same = zeros(TW, BC, PIXELS_LAST)
        mixed_above = zeros(TW, BC, PIXELS_LAST)
        mixed_same = zeros(TW, BC, PIXELS_LAST)
        sum_above = zeros(TW, BC, PIXELS_LAST)
        sum_same = zeros(TW, BC, PIXELS_LAST)
        grad_1 = zeros(TW, BC, PIXELS_LAST)  # a digit: so many rows before h
        grad_2 = zeros(TW, BC, PIXELS_LAST)
        a_1 = zeros(TW, BC, PIXELS_LAST)  # own pixels alone
        a_2 = zeros(TW, BC, PIXELS_LAST)
        q_1 = zeros(TW, BC, PIXELS_LAST)
        q_2 = zeros(TW, BC, PIXELS_LAST)
        k_1 = zeros(TW, BC, PIXELS_LAST)
        k_2 = zeros(TW, BC, PIXELS_LAST)
        channel_q = zeros(TW, BC, PIXELS_LAST)
        channel_k = zeros(TW, BC, PIXELS_LAST)
        for h in tl.range(first - 2, last + 2, num_stages=STAGES):
            real = (column >= 0) & (column < limit(h, 0, H, W))
            grad_0 = tl.load(
                grad_at + row_offset(h, W, C, PIXELS_LAST), by_pixel(real, PIXELS_LAST) & there, 0.0
            ).to(tl.float32)
            near = (column >= 0) & (
                column < limit(h, tl.maximum(first - 1, 0), tl.minimum(last + 1, H), W)
            )
            inside = by_pixel(near, PIXELS_LAST) & there
            at = row_offset(h, W, 3 * C, PIXELS_LAST)
            q_0 = tl.load(q_at + at, inside, 0.0).to(tl.float32)
            k_0 = tl.load(k_at + at, inside, 0.0).to(tl.float32)
            s_q = by_pixel(tl.load(s_at + wide(h) * W, near, 0.0), PIXELS_LAST)
            s_k = by_pixel(tl.load(s_at + wide(H + h) * W, near, 0.0), PIXELS_LAST)
            a = q_0 * s_q * gate_q + k_0 * s_k * gate_k
            here = by_pixel((own >= 0) & (own < limit(h, first, last, W)), PIXELS_LAST)
            a_0 = tl.where(here, a, 0.0)
            of_proj_bias += tl.where(here, grad_0, 0.0)

            # Row h-1: the gradient at u, the hidden map l, and with v the rest of proj.
            left, right = sides(grad_0, TW, BC, PIXELS_LAST)
            grad_mixed, mixed_above, mixed_same = convolve_back_row(
                mixed_above, mixed_same, left, grad_0, right, proj
            )
            left, right = sides(a, TW, BC, PIXELS_LAST)
            hidden, hidden_above, hidden_same = convolve_row(
                hidden_above, hidden_same, left, a, right, dwc
            )
            hidden += dwc_bias
            near = (column >= 0) & (
                column < limit(h - 1, tl.maximum(first - 1, 0), tl.minimum(last + 1, H), W)
            )
            at = v_offset + row_offset(h - 1, W, 3 * C, PIXELS_LAST)
            v = tl.load(qkv + at, by_pixel(near, PIXELS_LAST) & there, 0.0).to(tl.float32)
            mine = (own >= 0) & (own < limit(h - 1, first, last, W))
            here = by_pixel(mine, PIXELS_LAST)
            tl.store(
                grad_qkv + at, (grad_mixed * hidden).to(grad_qkv.dtype.element_ty), here & there
            )
            grad_hidden = grad_mixed * v
            of_dwc_bias += tl.where(here, grad_hidden, 0.0)
            u = tl.where(here, hidden * v, 0.0)
            left, right = sides(u, TW, BC, PIXELS_LAST)
            of_proj = (
                of_proj[0] + grad_0 * left,
                of_proj[1] + grad_0 * u,
                of_proj[2] + grad_0 * right,
                of_proj[3] + grad_1 * left,
                of_proj[4] + grad_1 * u,
                of_proj[5] + grad_1 * right,
                of_proj[6] + grad_2 * left,
                of_proj[7] + grad_2 * u,
                of_proj[8] + grad_2 * right,
            )

            # Row h-2: ga.
            left, right = sides(grad_hidden, TW, BC, PIXELS_LAST)
            at_sum, sum_above, sum_same = convolve_back_row(
                sum_above, sum_same, left, grad_hidden, right, dwc
            )
            of_dwc = (
                of_dwc[0] + a_2 * right,
                of_dwc[1] + a_2 * grad_hidden,
                of_dwc[2] + a_2 * left,
                of_dwc[3] + a_1 * right,
                of_dwc[4] + a_1 * grad_hidden,
                of_dwc[5] + a_1 * left,
                of_dwc[6] + a_0 * right,
                of_dwc[7] + a_0 * grad_hidden,
                of_dwc[8] + a_0 * left,
            )
            mine = (own >= 0) & (own < limit(h - 2, first, last, W))
            here = by_pixel(mine, PIXELS_LAST)
            tl.store(
                sum_at + row_offset(h - 2, W, C, PIXELS_LAST),
                at_sum.to(grad_sum.dtype.element_ty),
                here & there,
            )
            by_q = tl.where(here, at_sum * q_2, 0.0)
            by_k = tl.where(here, at_sum * k_2, 0.0)
            to_q, to_k = wide(h - 2) * W, wide(H + h - 2) * W
            tl.store(pixel_at + to_q, over_channels(by_q * gate_q, PIXELS_LAST), mine)
            tl.store(pixel_at + to_k, over_channels(by_k * gate_k, PIXELS_LAST), mine)
            channel_q += by_q * by_pixel(tl.load(s_at + to_q, mine, 0.0), PIXELS_LAST)
            channel_k += by_k * by_pixel(tl.load(s_at + to_k, mine, 0.0), PIXELS_LAST)
            grad_2, grad_1 = grad_1, grad_0
            a_2, a_1 = a_1, a_0
            q_2, q_1 = q_1, q_0
            k_2, k_1 = k_1, k_0
        to = channel_sum + wide(part) * 2 * B * C
        store_per_image(to, channel_q, g, image, B, W, channel, C, TW, 2, PIXELS_LAST)
        to += wide(B) * C
        store_per_image(to, channel_k, g, image, B, W, channel, C, TW, 2, PIXELS_LAST)
    to = weights + wide(tl.program_id(0)) * 20 * C
    store_taps(to, of_dwc, channel, C, PIXELS_LAST)
    tl.store(to + 9 * C + channel, over_pixels(of_dwc_bias, PIXELS_LAST), channel < C)
    store_taps(to + 10 * C, of_proj, channel, C, PIXELS_LAST)
    tl.store(to + 19 * C + channel, over_pixels(of_proj_bias, PIXELS_LAST), channel < C)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_gate_kernel(
    qkv,  # (B, 3C, H, W)
    vectors,
    statistics,  # (2, 2, C)
    eps_q,
    eps_k,
    spatial,  # (B, 2, H, W) float32: s
    pixel,  # (blocks, B, 2, H, W) float32: their sum is e
    shift,  # (2, B, C) float32
    logit,  # (B, 2, H, W) float32: es
    sums,  # (programs, 2, 2, C): for each gate sums of es and of es n^, where n > 0
    blocks,
    B,
    H,
    W,
    rows,
    repeat,
    C: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """B2. All channels in one tile, as in `gates_kernel`."""
    group, until, tile, first, last, _ = work(B, H, W, rows, repeat, TW, 1)
    gate = tl.program_id(2)
    channel = tl.arange(0, BC)
    there = by_channel(channel < C, PIXELS_LAST)
    v = vectors + gate * 13 * C
    stat = statistics + gate * 2 * C
    variance = vector(stat + C, channel, C, PIXELS_LAST, 1.0)
    rstd = 1.0 / tl.sqrt(variance + tl.where(gate == 0, eps_q, eps_k))
    minus_mean = vector(v + 9 * C, channel, C, PIXELS_LAST) - vector(stat, channel, C, PIXELS_LAST)
    norm_weight = vector(v + 10 * C, channel, C, PIXELS_LAST)
    norm_bias = vector(v + 11 * C, channel, C, PIXELS_LAST)
    w = taps(v, channel, C, PIXELS_LAST)
    of_one = zeros(TW, BC, PIXELS_LAST)
    of_hat = zeros(TW, BC, PIXELS_LAST)
    for g in range(group, until):
        image, column, own = place(g, tile, B, W, TW, 1)
        z_at = qkv + offsets(image, column, gate * C + channel, H, W, 3 * C, PIXELS_LAST)
        s_offset = maps(image, H, W, 2, gate) + column
        of_image = by_pixel(image.to(tl.int64) * C, PIXELS_LAST) + by_channel(channel, PIXELS_LAST)
        known = by_pixel(column >= 0, PIXELS_LAST) & there
        by_shift = tl.load(shift + wide(gate) * B * C + of_image, known, 0.0)
        above = zeros(TW, BC, PIXELS_LAST)
        same = zeros(TW, BC, PIXELS_LAST)
        before = zeros(TW, BC, PIXELS_LAST)
        for h in tl.range(first - 1, last + 1, num_stages=STAGES):
            inside = by_pixel((column >= 0) & (column < limit(h, 0, H, W)), PIXELS_LAST)
            z = tl.load(z_at + row_offset(h, W, 3 * C, PIXELS_LAST), inside & there, 0.0)
            z = z.to(tl.float32)
            left, right = sides(z, TW, BC, PIXELS_LAST)
            d, above, same = convolve_row(above, same, left, z, right, w)
            hat = (d + minus_mean) * rstd
            done = (own >= 0) & (own < limit(h - 1, first, last, W))
            at = s_offset + wide(h - 1) * W
            e = over_channels(before * by_shift, PIXELS_LAST)
            for block in range(blocks):
                e += tl.load(pixel + wide(block) * B * 2 * H * W + at, done, 0.0)
            s = tl.load(spatial + at, done, 0.0)
            es = e * s * (1.0 - s)
            tl.store(logit + at, es, done)
            n = norm_weight * hat + norm_bias
            counted = by_pixel(done, PIXELS_LAST)
            passed = tl.where(n <= 0, 0.0, by_pixel(es, PIXELS_LAST))  # NaN stays
            of_one += tl.where(counted, passed, 0.0)
            of_hat += tl.where(counted, passed * hat, 0.0)
            before = z
    to = sums + (wide(tl.program_id(0)) * 2 + gate) * 2 * C + channel
    tl.store(to, over_pixels(of_one, PIXELS_LAST), channel < C)
    tl.store(to + C, over_pixels(of_hat, PIXELS_LAST), channel < C)


@triton.jit
def gate_constants(
    vectors, statistics, eps, coefficients, channel, C: tl.constexpr, PIXELS_LAST: tl.constexpr
):
    """Of one gate, for B3: the constants of n^, of n, and of gd = c0 es [n > 0] + c1 + c2 n^."""
    variance = vector(statistics + C, channel, C, PIXELS_LAST, 1.0)
    bias = vector(vectors + 9 * C, channel, C, PIXELS_LAST)
    return (
        bias - vector(statistics, channel, C, PIXELS_LAST),
        1.0 / tl.sqrt(variance + eps),
        vector(vectors + 10 * C, channel, C, PIXELS_LAST),
        vector(vectors + 11 * C, channel, C, PIXELS_LAST),
        vector(vectors + 12 * C, channel, C, PIXELS_LAST)
        * vector(coefficients, channel, C, PIXELS_LAST),
        vector(coefficients + C, channel, C, PIXELS_LAST),
        vector(coefficients + 2 * C, channel, C, PIXELS_LAST),
    )


@triton.jit(do_not_specialize=RUN_TIME)
def backward_depthwise_kernel(
    qkv,  # (B, 3C, H, W)
    vectors,
    statistics,  # (2, 2, C)
    eps_q,
    eps_k,
    spatial,  # (B, 2, H, W) float32: s
    gates,  # (2, B, C) float32: g
    shift,  # (2, B, C) float32
    logit,  # (B, 2, H, W) float32: es
    coefficients,  # (2, 3, C) float32
    grad_sum,  # (B, C, H, W): ga
    grad_qkv,  # (B, 3C, H, W); the parts of q and k are written
    weights,  # (programs, 2, 10C) float32: gradients of the convolution (C, 9) and its bias
    B,
    H,
    W,
    rows,
    repeat,
    C: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """B3. Row h of q and k comes in; gd follows at row h-1, the gradient at q and k at h-2."""
    group, until, tile, first, last, _ = work(B, H, W, rows, repeat, TW, 2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    there = by_channel(channel < C, PIXELS_LAST)
    w_q = taps(vectors, channel, C, PIXELS_LAST)
    w_k = taps(vectors + 13 * C, channel, C, PIXELS_LAST)
    fixed_q = gate_constants(vectors, statistics, eps_q, coefficients, channel, C, PIXELS_LAST)
    fixed_k = gate_constants(
        vectors + 13 * C,
        statistics + 2 * C,
        eps_k,
        coefficients + 3 * C,
        channel,
        C,
        PIXELS_LAST,
    )
    of_q = nine_zeros(TW, BC, PIXELS_LAST)
    of_k = nine_zeros(TW, BC, PIXELS_LAST)
    of_q_bias = zeros(TW, BC, PIXELS_LAST)
    of_k_bias = zeros(TW, BC, PIXELS_LAST)
    for g in range(group, until):
        image, column, own = place(g, tile, B, W, TW, 2)
        q_offset = offsets(image, column, channel, H, W, 3 * C, PIXELS_LAST)
        k_offset = offsets(image, column, C + channel, H, W, 3 * C, PIXELS_LAST)
        sum_at = grad_sum + offsets(image, column, channel, H, W, C, PIXELS_LAST)
        s_offset = maps(image, H, W, 2, 0) + column
        of_image = by_pixel(image.to(tl.int64) * C, PIXELS_LAST) + by_channel(channel, PIXELS_LAST)
        to_k = wide(B) * C + of_image
        known = by_pixel(column >= 0, PIXELS_LAST) & there
        gate_q = tl.load(gates + of_image, known, 0.0)
        gate_k = tl.load(gates + to_k, known, 0.0)
        shift_q = tl.load(shift + of_image, known, 0.0)
        shift_k = tl.load(shift + to_k, known, 0.0)
        d_q_above = zeros(TW, BC, PIXELS_LAST)
        d_q_same = zeros(TW, BC, PIXELS_LAST)
        d_k_above = zeros(TW, BC, PIXELS_LAST)
        d_k_same = zeros(TW, BC, PIXELS_LAST)
        q_above = zeros(TW, BC, PIXELS_LAST)
        q_same = zeros(TW, BC, PIXELS_LAST)
        k_above = zeros(TW, BC, PIXELS_LAST)
        k_same = zeros(TW, BC, PIXELS_LAST)
        q_1 = zeros(TW, BC, PIXELS_LAST)  # own pixels alone
        q_2 = zeros(TW, BC, PIXELS_LAST)
        k_1 = zeros(TW, BC, PIXELS_LAST)
        k_2 = zeros(TW, BC, PIXELS_LAST)
        for h in tl.range(first - 2, last + 2, num_stages=STAGES):
            inside = by_pixel((column >= 0) & (column < limit(h, 0, H, W)), PIXELS_LAST) & there
            at = row_offset(h, W, 3 * C, PIXELS_LAST)
            q = tl.load(qkv + q_offset + at, inside, 0.0).to(tl.float32)
            k = tl.load(qkv + k_offset + at, inside, 0.0).to(tl.float32)
            here = by_pixel((own >= 0) & (own < limit(h, first, last, W)), PIXELS_LAST)
            near = (column >= 0) & (
                column < limit(h - 1, tl.maximum(first - 1, 0), tl.minimum(last + 1, H), W)
            )
            here_1 = (own >= 0) & (own < limit(h - 1, first, last, W))
            es_at = logit + s_offset
            es_q = tl.load(es_at + wide(h - 1) * W, near, 0.0)
            es_k = tl.load(es_at + wide(H + h - 1) * W, near, 0.0)
            here_2 = (own >= 0) & (own < limit(h - 2, first, last, W))
            s_at = spatial + s_offset
            s_q = by_pixel(tl.load(s_at + wide(h - 2) * W, here_2, 0.0), PIXELS_LAST)
            s_k = by_pixel(tl.load(s_at + wide(H + h - 2) * W, here_2, 0.0), PIXELS_LAST)
            written = by_pixel(here_2, PIXELS_LAST) & there
            at_sum = tl.load(sum_at + row_offset(h - 2, W, C, PIXELS_LAST), written, 0.0)
            at_sum = at_sum.to(tl.float32)
            at = row_offset(h - 2, W, 3 * C, PIXELS_LAST)

            q_0 = tl.where(here, q, 0.0)
            grad_q, d_q_above, d_q_same, q_above, q_same, of_q, of_q_bias = depthwise_row(
                q, q_0, q_1, q_2, es_q, near, here_1,
                d_q_above, d_q_same, q_above, q_same, of_q, of_q_bias, w_q, fixed_q,
                TW, BC, PIXELS_LAST,
            )  # fmt: skip
            grad_q += (at_sum * gate_q + shift_q) * s_q
            tl.store(grad_qkv + q_offset + at, grad_q.to(grad_qkv.dtype.element_ty), written)
            q_2, q_1 = q_1, q_0

            k_0 = tl.where(here, k, 0.0)
            grad_k, d_k_above, d_k_same, k_above, k_same, of_k, of_k_bias = depthwise_row(
                k, k_0, k_1, k_2, es_k, near, here_1,
                d_k_above, d_k_same, k_above, k_same, of_k, of_k_bias, w_k, fixed_k,
                TW, BC, PIXELS_LAST,
            )  # fmt: skip
            grad_k += (at_sum * gate_k + shift_k) * s_k
            tl.store(grad_qkv + k_offset + at, grad_k.to(grad_qkv.dtype.element_ty), written)
            k_2, k_1 = k_1, k_0
    to = weights + wide(tl.program_id(0)) * 20 * C
    store_taps(to, of_q, channel, C, PIXELS_LAST)
    tl.store(to + 9 * C + channel, over_pixels(of_q_bias, PIXELS_LAST), channel < C)
    store_taps(to + 10 * C, of_k, channel, C, PIXELS_LAST)
    tl.store(to + 19 * C + channel, over_pixels(of_k_bias, PIXELS_LAST), channel < C)


@triton.jit
def depthwise_row(
    z, z_0, z_1, z_2, es, near, own,
    d_above, d_same, grad_above, grad_same, of_taps, of_bias, w, fixed,
    TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr,
):  # fmt: skip
    """One gate's share of a step of B3: the convolution's part of the gradient at row h-2."""
    left, right = sides(z, TW, BC, PIXELS_LAST)
    d, d_above, d_same = convolve_row(d_above, d_same, left, z, right, w)
    hat = (d + fixed[0]) * fixed[1]
    n = fixed[2] * hat + fixed[3]
    at_n = tl.where(n <= 0, 0.0, by_pixel(es, PIXELS_LAST))  # NaN stays
    at_d = fixed[4] * at_n + fixed[5] + fixed[6] * hat
    at_d = tl.where(by_pixel(near, PIXELS_LAST), at_d, 0.0)
    of_bias += tl.where(by_pixel(own, PIXELS_LAST), at_d, 0.0)
    left, right = sides(at_d, TW, BC, PIXELS_LAST)
    grad, grad_above, grad_same = convolve_back_row(grad_above, grad_same, left, at_d, right, w)
    of_taps = (
        of_taps[0] + z_2 * right,
        of_taps[1] + z_2 * at_d,
        of_taps[2] + z_2 * left,
        of_taps[3] + z_1 * right,
        of_taps[4] + z_1 * at_d,
        of_taps[5] + z_1 * left,
        of_taps[6] + z_0 * right,
        of_taps[7] + z_0 * at_d,
        of_taps[8] + z_0 * left,
    )
    return grad, d_above, d_same, grad_above, grad_same, of_taps, of_bias
