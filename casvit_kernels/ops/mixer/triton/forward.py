"""Kernels of the forward: statistics of BatchNorm, spatial gates, channel gates, combination.

The symbols are those of `backends.base.Phases`. Maps are NCHW (PIXELS_LAST) or channels_last, of any
dtype; arithmetic is float32. `vectors` is what `weights.pack` makes. B, H, W, rows and repeat are
run-time values on purpose: one compilation serves all sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import (
    added,
    by_channel,
    by_pixel,
    convolve,
    limit,
    load,
    load_per_image,
    maps,
    next_to,
    offsets,
    over_channels,
    over_pixels,
    place,
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

# Arguments whose values kernels are not compiled for.
RUN_TIME = [*"BHW", "rows", "repeat", "parts", "programs", "scale", "eps_q", "eps_k"]


@triton.jit(do_not_specialize=RUN_TIME)
def statistics_kernel(
    qkv,  # (B, 3C, H, W)
    vectors,
    number,  # (programs,)
    partial,  # (programs, 2, 2, C): of q and k, mean and sum of squared deviations
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
    """Welford's update on each lane, then the lanes merged: no sum of squares that could cancel."""
    group, until, tile, first, last, _ = work(B, H, W, rows, repeat, TW, 1)
    gate = tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    v = vectors + gate * 13 * C
    w = taps(v, channel, C, PIXELS_LAST)
    bias = vector(v + 9 * C, channel, C, PIXELS_LAST)
    there = by_channel(channel < C, PIXELS_LAST)
    count = tl.zeros((TW,), tl.float32)
    mean = zeros(TW, BC, PIXELS_LAST)
    m2 = zeros(TW, BC, PIXELS_LAST)
    for g in range(group, until):
        image, local, column, own = place(g, tile, B, W, TW, 1)
        at = offsets(local, column, channel, H, W, 3 * C, TW, PIXELS_LAST)
        z_1 = zeros(TW, BC, PIXELS_LAST).to(qkv.dtype.element_ty)  # a digit: so many rows before h
        z_2 = z_1
        for h in tl.range(first - 1, last + 1, num_stages=STAGES):
            inside = by_pixel((column >= 0) & (column < limit(h, 0, H, W)), PIXELS_LAST)
            row = qkv + start(image, h, H, W, gate * C, 3 * C, PIXELS_LAST)
            z_0 = load(row, at, inside & there, TW, BC, PIXELS_LAST)
            d = convolve(z_2, z_1, z_0, w, TW, BC, PIXELS_LAST) + bias
            z_2, z_1 = z_1, z_0
            counted = (own >= 0) & (own < limit(h - 1, first, last, W))
            count += tl.where(counted, 1.0, 0.0)
            weight = tl.where(counted, 1.0 / tl.maximum(count, 1.0), 0.0)
            delta = d - mean
            mean += delta * by_pixel(weight, PIXELS_LAST)
            m2 += tl.where(by_pixel(counted, PIXELS_LAST), delta * (d - mean), 0.0)
    total = tl.sum(count, axis=0)
    number_of = by_pixel(count, PIXELS_LAST)
    merged = over_pixels(mean * number_of, PIXELS_LAST) / tl.maximum(total, 1.0)
    apart = mean - by_channel(merged, PIXELS_LAST)
    m2 = over_pixels(m2 + apart * apart * number_of, PIXELS_LAST)
    program = tl.program_id(0)
    if gate + tl.program_id(1) == 0:
        tl.store(number + program, total)
    at = partial + wide(program * 2 + gate) * 2 * C + channel
    tl.store(at, merged, channel < C)
    tl.store(at + C, m2, channel < C)


@triton.jit(do_not_specialize=RUN_TIME)
def merge_statistics_kernel(
    number,  # (programs,)
    partial,  # (programs, 2, 2, C)
    statistics,  # (2, 2, C): of q and k, mean and biased variance
    programs,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gate = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = (channel < C)[None, :]
    total = tl.zeros((BLOCK,), tl.float64)
    mean = tl.zeros((BLOCK, BLOCK), tl.float64)
    for base in range(0, programs, BLOCK):
        p = base + tl.arange(0, BLOCK)
        n = tl.load(number + p, p < programs, 0.0).to(tl.float64)
        at = partial + ((p.to(tl.int64) * 2 + gate) * 2 * C)[:, None] + channel[None, :]
        each = tl.load(at, (p < programs)[:, None] & there, 0.0)
        total += n
        mean += n[:, None] * each.to(tl.float64)
    count = tl.sum(total, axis=0)
    center = tl.sum(mean, axis=0) / count
    m2 = tl.zeros((BLOCK, BLOCK), tl.float64)
    for base in range(0, programs, BLOCK):
        p = base + tl.arange(0, BLOCK)
        n = tl.load(number + p, p < programs, 0.0).to(tl.float64)
        at = partial + ((p.to(tl.int64) * 2 + gate) * 2 * C)[:, None] + channel[None, :]
        there_too = (p < programs)[:, None] & there
        apart = tl.load(at, there_too, 0.0).to(tl.float64) - center[None, :]
        m2 += tl.load(at + C, there_too, 0.0).to(tl.float64) + n[:, None] * apart * apart
    at = statistics + gate * 2 * C + channel
    tl.store(at, center.to(tl.float32), channel < C)
    tl.store(at + C, (tl.sum(m2, axis=0) / count).to(tl.float32), channel < C)


@triton.jit(do_not_specialize=RUN_TIME)
def gates_kernel(
    qkv,  # (B, 3C, H, W)
    vectors,
    statistics,  # (2, 2, C)
    eps_q,
    eps_k,
    spatial,  # (B, 2, H, W) float32: s
    pooled,  # (parts, 2, B, C) float32: sums of z s
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
    """All channels in one tile: q and k are read once, for s and for the mean of z s alike."""
    group, until, tile, first, last, part = work(B, H, W, rows, repeat, TW, 1)
    gate = tl.program_id(2)
    channel = tl.arange(0, BC)
    there = by_channel(channel < C, PIXELS_LAST)
    v = vectors + gate * 13 * C
    stat = statistics + gate * 2 * C
    variance = vector(stat + C, channel, C, PIXELS_LAST, 1.0)
    mean = vector(stat, channel, C, PIXELS_LAST)
    scale = vector(v + 10 * C, channel, C, PIXELS_LAST) / tl.sqrt(
        variance + tl.where(gate == 0, eps_q, eps_k)
    )
    shift = vector(v + 11 * C, channel, C, PIXELS_LAST)
    bias = (vector(v + 9 * C, channel, C, PIXELS_LAST) - mean) * scale + shift
    w = taps(v, channel, C, PIXELS_LAST)
    w = (
        w[0] * scale,
        w[1] * scale,
        w[2] * scale,
        w[3] * scale,
        w[4] * scale,
        w[5] * scale,
        w[6] * scale,
        w[7] * scale,
        w[8] * scale,
    )
    to_logit = vector(v + 12 * C, channel, C, PIXELS_LAST)
    for g in range(group, until):
        image, local, column, own = place(g, tile, B, W, TW, 1)
        at = offsets(local, column, channel, H, W, 3 * C, TW, PIXELS_LAST)
        s_at = maps(local, column, H, W)
        z_1 = zeros(TW, BC, PIXELS_LAST).to(qkv.dtype.element_ty)
        z_2 = z_1
        pool = zeros(TW // 2, BC, PIXELS_LAST)
        for h in tl.range(first - 1, last + 1, num_stages=STAGES):
            inside = by_pixel((column >= 0) & (column < limit(h, 0, H, W)), PIXELS_LAST)
            row = qkv + start(image, h, H, W, gate * C, 3 * C, PIXELS_LAST)
            z_0 = load(row, at, inside & there, TW, BC, PIXELS_LAST)
            n = convolve(z_2, z_1, z_0, w, TW, BC, PIXELS_LAST) + bias
            r = tl.where(n <= 0, 0.0, n)  # NaN stays
            s = tl.sigmoid(over_channels(r * to_logit, PIXELS_LAST))
            done = (own >= 0) & (own < limit(h - 1, first, last, W))
            tl.store(spatial + start_of_maps(image, h - 1, H, W, gate) + s_at, s, done)
            gated = z_1.to(tl.float32) * by_pixel(s, PIXELS_LAST)
            gated = tl.where(by_pixel(done, PIXELS_LAST), gated, 0.0)
            pool = added(pool, gated, TW, BC, PIXELS_LAST)
            z_2, z_1 = z_1, z_0
        to = pooled + wide(part * 2 + gate) * B * C
        store_per_image(to, pool, g, local, column, B, W, channel, C, TW, 1, PIXELS_LAST)


@triton.jit(do_not_specialize=RUN_TIME)
def channel_gates_kernel(
    partial,  # (parts, 2, B, C)
    vectors,  # ends with the weights (2, C, C)
    pooled,  # (2, B, C) float32
    gates,  # (2, B, C) float32: g
    parts,
    scale,  # 1 / (H W)
    B,
    C: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """The parts summed to means, the product with the weights of both gates, the sigmoid."""
    gate = tl.program_id(2)
    image = tl.program_id(1) * BB + tl.arange(0, BB)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    row = image.to(tl.int64)[:, None] * C
    base = wide(gate) * B * C
    sums = tl.zeros((BB, BC), tl.float32)
    for base_k in range(0, C, BK):
        k = base_k + tl.arange(0, BK)
        there = (image < B)[:, None] & (k < C)[None, :]
        mean = tl.zeros((BB, BK), tl.float32)
        for p in range(parts):
            at = partial + wide(p) * 2 * B * C + base
            mean += tl.load(at + row + k[None, :], there, 0.0)
        mean *= scale
        if tl.program_id(0) == 0:
            tl.store(pooled + base + row + k[None, :], mean, there)
        at = vectors + 46 * C + gate * C * C + channel[None, :] * C + k[:, None]
        w = tl.load(at, (channel < C)[None, :] & (k < C)[:, None], 0.0)
        sums = tl.dot(mean, w, sums, input_precision="ieee")
    there = (image < B)[:, None] & (channel < C)[None, :]
    tl.store(gates + base + row + channel[None, :], tl.sigmoid(sums), there)


@triton.jit(do_not_specialize=RUN_TIME)
def combine_kernel(
    qkv,  # (B, 3C, H, W)
    vectors,
    spatial,  # (B, 2, H, W) float32: s
    gates,  # (2, B, C) float32: g
    out,  # (B, C, H, W)
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
    """a, dwc, the product with v and proj in one sweep; each row of q, k and v is read once."""
    group, until, tile, first, last, _ = work(B, H, W, rows, repeat, TW, 2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    there = by_channel(channel < C, PIXELS_LAST)
    dwc = taps(vectors + 26 * C, channel, C, PIXELS_LAST)
    dwc_bias = vector(vectors + 35 * C, channel, C, PIXELS_LAST)
    proj = taps(vectors + 36 * C, channel, C, PIXELS_LAST)
    proj_bias = vector(vectors + 45 * C, channel, C, PIXELS_LAST)
    for g in range(group, until):
        image, local, column, own = place(g, tile, B, W, TW, 2)
        beside = next_to(column, W, TW)
        at = offsets(local, column, channel, H, W, 3 * C, TW, PIXELS_LAST)
        out_at = offsets(local, column, channel, H, W, C, TW, PIXELS_LAST)
        s_at = maps(local, column, H, W)
        gate_q = load_per_image(gates, image, local, column, channel, C, TW, BC, PIXELS_LAST)
        gate_k = load_per_image(
            gates + wide(B) * C, image, local, column, channel, C, TW, BC, PIXELS_LAST
        )
        a_1 = zeros(TW, BC, PIXELS_LAST)
        a_2 = a_1
        u_1 = a_1
        u_2 = a_1
        for h in tl.range(first - 2, last + 2, num_stages=STAGES):
            row = (column >= 0) & (column < limit(h, 0, H, W))
            inside = by_pixel(row, PIXELS_LAST) & there
            q_at = qkv + start(image, h, H, W, 0, 3 * C, PIXELS_LAST)
            k_at = qkv + start(image, h, H, W, C, 3 * C, PIXELS_LAST)
            v_at = qkv + start(image, h - 1, H, W, 2 * C, 3 * C, PIXELS_LAST)
            q = load(q_at, at, inside, TW, BC, PIXELS_LAST).to(tl.float32)
            k = load(k_at, at, inside, TW, BC, PIXELS_LAST).to(tl.float32)
            before = (beside >= 0) & (beside < limit(h - 1, tl.maximum(first - 1, 0), H, W))
            before = by_pixel(before, PIXELS_LAST) & there
            v = load(v_at, at, before, TW, BC, PIXELS_LAST).to(tl.float32)
            s_q = tl.load(spatial + start_of_maps(image, h, H, W, 0) + s_at, row, 0.0)
            s_k = tl.load(spatial + start_of_maps(image, h, H, W, 1) + s_at, row, 0.0)
            a = q * by_pixel(s_q, PIXELS_LAST) * gate_q + k * by_pixel(s_k, PIXELS_LAST) * gate_k
            u = (convolve(a_2, a_1, a, dwc, TW, BC, PIXELS_LAST) + dwc_bias) * v
            mixed = convolve(u_2, u_1, u, proj, TW, BC, PIXELS_LAST) + proj_bias
            a_2, a_1 = a_1, a
            u_2, u_1 = u_1, u
            done = (own >= 0) & (own < limit(h - 2, first, last, W))
            store(
                out + start(image, h - 2, H, W, 0, C, PIXELS_LAST),
                out_at,
                mixed,
                by_pixel(done, PIXELS_LAST) & there,
                TW,
                BC,
                PIXELS_LAST,
            )
