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
    added,
    by_channel,
    by_pixel,
    convolve,
    limit,
    load,
    load_per_image,
    maps,
    moved,
    next_to,
    offsets,
    over_channels,
    over_pixels,
    pairs,
    place,
    reverse,
    start,
    start_of_maps,
    store,
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
def add_taps(
    sums, above, mid, below, t, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr
):
    """Add each pixel of t, times its neighbours in three rows, to the sums of nine weights."""
    above_even, above_odd = pairs(above.to(tl.float32), TW, BC, PIXELS_LAST)
    mid_even, mid_odd = pairs(mid.to(tl.float32), TW, BC, PIXELS_LAST)
    below_even, below_odd = pairs(below.to(tl.float32), TW, BC, PIXELS_LAST)
    even, odd = pairs(t, TW, BC, PIXELS_LAST)
    before = moved(odd, -1, TW // 2, BC, PIXELS_LAST)  # the left neighbours of the even lanes
    after = moved(even, 1, TW // 2, BC, PIXELS_LAST)
    return (
        sums[0] + above_even * odd + above_odd * after,
        sums[1] + above_even * even + above_odd * odd,
        sums[2] + above_even * before + above_odd * even,
        sums[3] + mid_even * odd + mid_odd * after,
        sums[4] + mid_even * even + mid_odd * odd,
        sums[5] + mid_even * before + mid_odd * even,
        sums[6] + below_even * odd + below_odd * after,
        sums[7] + below_even * even + below_odd * odd,
        sums[8] + below_even * before + below_odd * even,
    )


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
    pixel,  # (channel blocks, B, 2, H, W): sums of ga g z over the channels of a block
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
    of_dwc = nine_zeros(TW // 2, BC, PIXELS_LAST)
    of_proj = nine_zeros(TW // 2, BC, PIXELS_LAST)
    of_dwc_bias = zeros(TW // 2, BC, PIXELS_LAST)
    of_proj_bias = zeros(TW // 2, BC, PIXELS_LAST)
    for g in range(group, until):
        image, local, column, own = place(g, tile, B, W, TW, 2)
        beside = next_to(column, W, TW)
        at = offsets(local, column, channel, H, W, C, TW, PIXELS_LAST)
        at_qkv = offsets(local, column, channel, H, W, 3 * C, TW, PIXELS_LAST)
        s_at = maps(local, column, H, W)
        e = pixel + wide(tl.program_id(1)) * B * 2 * H * W + s_at
        gate_q = load_per_image(gates, image, local, column, channel, C, TW, BC, PIXELS_LAST)
        gate_k = load_per_image(
            gates + wide(B) * C, image, local, column, channel, C, TW, BC, PIXELS_LAST
        )
        grad_1 = zeros(TW, BC, PIXELS_LAST).to(grad.dtype.element_ty)  # a digit: rows before h
        grad_2 = grad_1
        q_1 = zeros(TW, BC, PIXELS_LAST).to(qkv.dtype.element_ty)
        q_2 = q_1
        k_1 = q_1
        k_2 = q_1
        s_q_1 = by_pixel(tl.zeros((TW,), tl.float32), PIXELS_LAST)
        s_q_2 = s_q_1
        s_k_1 = s_q_1
        s_k_2 = s_q_1
        a_1 = zeros(TW, BC, PIXELS_LAST)
        a_2 = a_1
        grad_hidden_1 = a_1
        grad_hidden_2 = a_1
        channel_q = zeros(TW // 2, BC, PIXELS_LAST)
        channel_k = channel_q
        for h in tl.range(first - 2, last + 2, num_stages=STAGES):
            real = (column >= 0) & (column < limit(h, 0, H, W))
            grad_0 = load(
                grad + start(image, h, H, W, 0, C, PIXELS_LAST), at,
                by_pixel(real, PIXELS_LAST) & there, TW, BC, PIXELS_LAST,
            )  # fmt: skip
            near = (beside >= 0) & (
                beside < limit(h, tl.maximum(first - 1, 0), tl.minimum(last + 1, H), W)
            )
            inside = by_pixel(near, PIXELS_LAST) & there
            q_at = qkv + start(image, h, H, W, 0, 3 * C, PIXELS_LAST)
            k_at = qkv + start(image, h, H, W, C, 3 * C, PIXELS_LAST)
            q_0 = load(q_at, at_qkv, inside, TW, BC, PIXELS_LAST)
            k_0 = load(k_at, at_qkv, inside, TW, BC, PIXELS_LAST)
            s_q = tl.load(spatial + start_of_maps(image, h, H, W, 0) + s_at, near, 0.0)
            s_k = tl.load(spatial + start_of_maps(image, h, H, W, 1) + s_at, near, 0.0)
            s_q_0, s_k_0 = by_pixel(s_q, PIXELS_LAST), by_pixel(s_k, PIXELS_LAST)
            a_0 = q_0.to(tl.float32) * s_q_0 * gate_q + k_0.to(tl.float32) * s_k_0 * gate_k
            here = by_pixel((own >= 0) & (own < limit(h, first, last, W)), PIXELS_LAST)
            mine = tl.where(here, grad_0.to(tl.float32), 0.0)
            of_proj_bias = added(of_proj_bias, mine, TW, BC, PIXELS_LAST)

            # Row h-1: the gradient at u, the hidden map l, and with v the rest of proj.
            grad_mixed = convolve(grad_2, grad_1, grad_0, reverse(proj), TW, BC, PIXELS_LAST)
            hidden = convolve(a_2, a_1, a_0, dwc, TW, BC, PIXELS_LAST) + dwc_bias
            near = (beside >= 0) & (
                beside < limit(h - 1, tl.maximum(first - 1, 0), tl.minimum(last + 1, H), W)
            )
            inside = by_pixel(near, PIXELS_LAST) & there
            v_start = start(image, h - 1, H, W, 2 * C, 3 * C, PIXELS_LAST)
            v = load(qkv + v_start, at_qkv, inside, TW, BC, PIXELS_LAST).to(tl.float32)
            here = by_pixel((own >= 0) & (own < limit(h - 1, first, last, W)), PIXELS_LAST)
            store(
                grad_qkv + v_start, at_qkv, (grad_mixed * hidden), here & there, TW, BC, PIXELS_LAST
            )
            u = tl.where(here, hidden * v, 0.0)
            of_proj = add_taps(of_proj, grad_2, grad_1, grad_0, u, TW, BC, PIXELS_LAST)

            # Row h-2: ga.
            grad_hidden = grad_mixed * v
            mine = tl.where(here, grad_hidden, 0.0)
            of_dwc_bias = added(of_dwc_bias, mine, TW, BC, PIXELS_LAST)
            of_dwc = add_taps(of_dwc, a_2, a_1, a_0, mine, TW, BC, PIXELS_LAST)
            at_sum = convolve(
                grad_hidden_2, grad_hidden_1, grad_hidden, reverse(dwc), TW, BC, PIXELS_LAST
            )
            done = (own >= 0) & (own < limit(h - 2, first, last, W))
            here = by_pixel(done, PIXELS_LAST)
            store(
                grad_sum + start(image, h - 2, H, W, 0, C, PIXELS_LAST),
                at,
                at_sum,
                here & there,
                TW,
                BC,
                PIXELS_LAST,
            )
            by_q = tl.where(here, at_sum * q_2.to(tl.float32), 0.0)
            by_k = tl.where(here, at_sum * k_2.to(tl.float32), 0.0)
            channel_q = added(channel_q, by_q * s_q_2, TW, BC, PIXELS_LAST)
            channel_k = added(channel_k, by_k * s_k_2, TW, BC, PIXELS_LAST)
            e_q = over_channels(by_q * gate_q, PIXELS_LAST)
            e_k = over_channels(by_k * gate_k, PIXELS_LAST)
            one = pixel.dtype.element_ty
            tl.store(e + start_of_maps(image, h - 2, H, W, 0), e_q.to(one), done)
            tl.store(e + start_of_maps(image, h - 2, H, W, 1), e_k.to(one), done)
            grad_2, grad_1 = grad_1, grad_0
            a_2, a_1 = a_1, a_0
            q_2, q_1 = q_1, q_0
            k_2, k_1 = k_1, k_0
            s_q_2, s_q_1 = s_q_1, s_q_0
            s_k_2, s_k_1 = s_k_1, s_k_0
            grad_hidden_2, grad_hidden_1 = grad_hidden_1, grad_hidden
        to = channel_sum + wide(part) * 2 * B * C
        store_per_image(to, channel_q, g, local, column, B, W, channel, C, TW, 2, PIXELS_LAST)
        to += wide(B) * C
        store_per_image(to, channel_k, g, local, column, B, W, channel, C, TW, 2, PIXELS_LAST)
    to = weights + wide(tl.program_id(0)) * 20 * C
    store_taps(to, of_dwc, channel, C, PIXELS_LAST)
    tl.store(to + 9 * C + channel, over_pixels(of_dwc_bias, PIXELS_LAST), channel < C)
    store_taps(to + 10 * C, reverse(of_proj), channel, C, PIXELS_LAST)
    tl.store(to + 19 * C + channel, over_pixels(of_proj_bias, PIXELS_LAST), channel < C)


@triton.jit(do_not_specialize=RUN_TIME)
def backward_gate_kernel(
    qkv,  # (B, 3C, H, W)
    vectors,
    statistics,  # (2, 2, C)
    eps_q,
    eps_k,
    spatial,  # (B, 2, H, W) float32: s
    pixel,  # (B, 2, H, W) float32: e without the part of `shift`
    shift,  # (2, B, C) float32
    logit,  # (B, 2, H, W): es
    sums,  # (programs, 2, 2, C): for each gate sums of es and of es n^, where n > 0
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
    scale = vector(v + 10 * C, channel, C, PIXELS_LAST) * rstd
    norm_bias = vector(v + 11 * C, channel, C, PIXELS_LAST)
    w = taps(v, channel, C, PIXELS_LAST)
    of_one = zeros(TW // 2, BC, PIXELS_LAST)
    of_hat = zeros(TW // 2, BC, PIXELS_LAST)
    for g in range(group, until):
        image, local, column, own = place(g, tile, B, W, TW, 1)
        at = offsets(local, column, channel, H, W, 3 * C, TW, PIXELS_LAST)
        s_at = maps(local, column, H, W)
        by_shift = load_per_image(
            shift + wide(gate) * B * C, image, local, column, channel, C, TW, BC, PIXELS_LAST
        )
        z_1 = zeros(TW, BC, PIXELS_LAST).to(qkv.dtype.element_ty)
        z_2 = z_1
        for h in tl.range(first - 1, last + 1, num_stages=STAGES):
            inside = by_pixel((column >= 0) & (column < limit(h, 0, H, W)), PIXELS_LAST)
            row = qkv + start(image, h, H, W, gate * C, 3 * C, PIXELS_LAST)
            z_0 = load(row, at, inside & there, TW, BC, PIXELS_LAST)
            done = (own >= 0) & (own < limit(h - 1, first, last, W))
            row_at = start_of_maps(image, h - 1, H, W, gate)
            # First the sum over channels: less has to be kept meanwhile.
            e = over_channels(z_1.to(tl.float32) * by_shift, PIXELS_LAST)
            e += tl.load(pixel + row_at + s_at, done, 0.0)
            s = tl.load(spatial + row_at + s_at, done, 0.0)
            # Rounded before it is summed: B3 subtracts the mean of what it reads.
            es = (e * s * (1.0 - s)).to(logit.dtype.element_ty).to(tl.float32)
            d = convolve(z_2, z_1, z_0, w, TW, BC, PIXELS_LAST) + minus_mean
            # es is 0 where the pixel is not own.
            passed = tl.where(scale * d + norm_bias <= 0, 0.0, by_pixel(es, PIXELS_LAST))
            of_one = added(of_one, passed, TW, BC, PIXELS_LAST)
            of_hat = added(of_hat, passed * d, TW, BC, PIXELS_LAST)
            # Last: stored at once, bfloat16 spills registers on sm_90.
            tl.store(logit + row_at + s_at, es.to(logit.dtype.element_ty), done)
            z_2, z_1 = z_1, z_0
    to = sums + (wide(tl.program_id(0)) * 2 + gate) * 2 * C + channel
    tl.store(to, over_pixels(of_one, PIXELS_LAST), channel < C)
    of_hat *= rstd
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
    logit,  # (B, 2, H, W): es
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
    of_q = nine_zeros(TW // 2, BC, PIXELS_LAST)
    of_k = nine_zeros(TW // 2, BC, PIXELS_LAST)
    of_q_bias = zeros(TW // 2, BC, PIXELS_LAST)
    of_k_bias = zeros(TW // 2, BC, PIXELS_LAST)
    for g in range(group, until):
        image, local, column, own = place(g, tile, B, W, TW, 2)
        beside = next_to(column, W, TW)
        at = offsets(local, column, channel, H, W, C, TW, PIXELS_LAST)
        at_qkv = offsets(local, column, channel, H, W, 3 * C, TW, PIXELS_LAST)
        s_at = maps(local, column, H, W)
        gate_q = load_per_image(gates, image, local, column, channel, C, TW, BC, PIXELS_LAST)
        gate_k = load_per_image(
            gates + wide(B) * C, image, local, column, channel, C, TW, BC, PIXELS_LAST
        )
        shift_q = load_per_image(shift, image, local, column, channel, C, TW, BC, PIXELS_LAST)
        shift_k = load_per_image(
            shift + wide(B) * C, image, local, column, channel, C, TW, BC, PIXELS_LAST
        )
        q_1 = zeros(TW, BC, PIXELS_LAST).to(qkv.dtype.element_ty)
        q_2 = q_1
        k_1 = q_1
        k_2 = q_1
        d_q_1 = zeros(TW, BC, PIXELS_LAST)  # gd
        d_q_2 = d_q_1
        d_k_1 = d_q_1
        d_k_2 = d_q_1
        for h in tl.range(first - 2, last + 2, num_stages=STAGES):
            inside = by_pixel((column >= 0) & (column < limit(h, 0, H, W)), PIXELS_LAST) & there
            q_at = qkv + start(image, h, H, W, 0, 3 * C, PIXELS_LAST)
            k_at = qkv + start(image, h, H, W, C, 3 * C, PIXELS_LAST)
            q_0 = load(q_at, at_qkv, inside, TW, BC, PIXELS_LAST)
            k_0 = load(k_at, at_qkv, inside, TW, BC, PIXELS_LAST)
            near = (beside >= 0) & (
                beside < limit(h - 1, tl.maximum(first - 1, 0), tl.minimum(last + 1, H), W)
            )
            here = (own >= 0) & (own < limit(h - 1, first, last, W))
            es_q = tl.load(logit + start_of_maps(image, h - 1, H, W, 0) + s_at, near, 0.0)
            es_k = tl.load(logit + start_of_maps(image, h - 1, H, W, 1) + s_at, near, 0.0)
            es_q, es_k = es_q.to(tl.float32), es_k.to(tl.float32)
            done = (own >= 0) & (own < limit(h - 2, first, last, W))
            s_q = tl.load(spatial + start_of_maps(image, h - 2, H, W, 0) + s_at, done, 0.0)
            s_k = tl.load(spatial + start_of_maps(image, h - 2, H, W, 1) + s_at, done, 0.0)
            written = by_pixel(done, PIXELS_LAST) & there
            sum_at = grad_sum + start(image, h - 2, H, W, 0, C, PIXELS_LAST)
            at_sum = load(sum_at, at, written, TW, BC, PIXELS_LAST).to(tl.float32)

            d_q, of_q, of_q_bias = depthwise_row(
                q_2, q_1, q_0, es_q, near, here, of_q, of_q_bias, w_q, fixed_q, TW, BC, PIXELS_LAST
            )
            grad_q = convolve(d_q_2, d_q_1, d_q, reverse(w_q), TW, BC, PIXELS_LAST)
            grad_q += (at_sum * gate_q + shift_q) * by_pixel(s_q, PIXELS_LAST)
            to = grad_qkv + start(image, h - 2, H, W, 0, 3 * C, PIXELS_LAST)
            store(to, at_qkv, grad_q, written, TW, BC, PIXELS_LAST)

            d_k, of_k, of_k_bias = depthwise_row(
                k_2, k_1, k_0, es_k, near, here, of_k, of_k_bias, w_k, fixed_k, TW, BC, PIXELS_LAST
            )
            grad_k = convolve(d_k_2, d_k_1, d_k, reverse(w_k), TW, BC, PIXELS_LAST)
            grad_k += (at_sum * gate_k + shift_k) * by_pixel(s_k, PIXELS_LAST)
            to = grad_qkv + start(image, h - 2, H, W, C, 3 * C, PIXELS_LAST)
            store(to, at_qkv, grad_k, written, TW, BC, PIXELS_LAST)
            q_2, q_1 = q_1, q_0
            k_2, k_1 = k_1, k_0
            d_q_2, d_q_1 = d_q_1, d_q
            d_k_2, d_k_1 = d_k_1, d_k
    to = weights + wide(tl.program_id(0)) * 20 * C
    store_taps(to, of_q, channel, C, PIXELS_LAST)
    tl.store(to + 9 * C + channel, over_pixels(of_q_bias, PIXELS_LAST), channel < C)
    store_taps(to + 10 * C, of_k, channel, C, PIXELS_LAST)
    tl.store(to + 19 * C + channel, over_pixels(of_k_bias, PIXELS_LAST), channel < C)


@triton.jit
def depthwise_row(
    above, mid, below, es, near, own, of_taps, of_bias, w, fixed,
    TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr,
):  # fmt: skip
    """One gate's share of a step of B3: gd at row h-1, and what it adds to the weights' gradients."""
    hat = (convolve(above, mid, below, w, TW, BC, PIXELS_LAST) + fixed[0]) * fixed[1]
    n = fixed[2] * hat + fixed[3]
    at_n = tl.where(n <= 0, 0.0, by_pixel(es, PIXELS_LAST))  # NaN stays
    at_d = fixed[4] * at_n + fixed[5] + fixed[6] * hat
    at_d = tl.where(by_pixel(near, PIXELS_LAST), at_d, 0.0)
    mine = tl.where(by_pixel(own, PIXELS_LAST), at_d, 0.0)
    of_taps = add_taps(of_taps, above, mid, below, mine, TW, BC, PIXELS_LAST)
    return at_d, of_taps, added(of_bias, mine, TW, BC, PIXELS_LAST)
