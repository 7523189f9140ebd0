"""Kernels of the forward: statistics of BatchNorm, spatial gates, channel gates, combination.

The symbols are those of `backends.base.Phases`. Maps are NCHW (PIXELS_LAST) or channels_last, of any
dtype; arithmetic is float32. `vectors` is what `weights.pack` makes. B, H, W, rows and repeat are
run-time values on purpose: one compilation serves all sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import (
    by_channel,
    by_pixel,
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

RUN_TIME = [
    "B",
    "H",
    "W",
    "rows",
    "repeat",
    "parts",
    "programs",
    "blocks",
    "scale",
    "eps_q",
    "eps_k",
]


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
        image, column, own = place(g, tile, B, W, TW, 1)
        z_at = qkv + offsets(image, column, gate * C + channel, H, W, 3 * C, PIXELS_LAST)
        above = zeros(TW, BC, PIXELS_LAST)
        same = zeros(TW, BC, PIXELS_LAST)
        for h in tl.range(first - 1, last + 1, num_stages=STAGES):
            inside = by_pixel((column >= 0) & (column < limit(h, 0, H, W)), PIXELS_LAST)
            z = tl.load(z_at + row_offset(h, W, 3 * C, PIXELS_LAST), inside & there, 0.0)
            z = z.to(tl.float32)
            left, right = sides(z, TW, BC, PIXELS_LAST)
            d, above, same = convolve_row(above, same, left, z, right, w)
            d += bias
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
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    gate = tl.program_id(1)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    there = (channel < C)[None, :]
    total = tl.zeros((BP,), tl.float64)
    mean = tl.zeros((BP, BC), tl.float64)
    for start in range(0, programs, BP):
        p = start + tl.arange(0, BP)
        n = tl.load(number + p, p < programs, 0.0).to(tl.float64)
        at = partial + ((p.to(tl.int64) * 2 + gate) * 2 * C)[:, None] + channel[None, :]
        each = tl.load(at, (p < programs)[:, None] & there, 0.0)
        total += n
        mean += n[:, None] * each.to(tl.float64)
    count = tl.sum(total, axis=0)
    center = tl.sum(mean, axis=0) / count
    m2 = tl.zeros((BP, BC), tl.float64)
    for start in range(0, programs, BP):
        p = start + tl.arange(0, BP)
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
        image, column, own = place(g, tile, B, W, TW, 1)
        z_at = qkv + offsets(image, column, gate * C + channel, H, W, 3 * C, PIXELS_LAST)
        s_at = spatial + maps(image, H, W, 2, gate) + column
        above = zeros(TW, BC, PIXELS_LAST)
        same = zeros(TW, BC, PIXELS_LAST)
        before = zeros(TW, BC, PIXELS_LAST)
        pool = zeros(TW, BC, PIXELS_LAST)
        for h in tl.range(first - 1, last + 1, num_stages=STAGES):
            inside = by_pixel((column >= 0) & (column < limit(h, 0, H, W)), PIXELS_LAST)
            z = tl.load(z_at + row_offset(h, W, 3 * C, PIXELS_LAST), inside & there, 0.0)
            z = z.to(tl.float32)
            left, right = sides(z, TW, BC, PIXELS_LAST)
            n, above, same = convolve_row(above, same, left, z, right, w)
            n += bias
            r = tl.where(n <= 0, 0.0, n)  # NaN stays
            s = tl.sigmoid(over_channels(r * to_logit, PIXELS_LAST))
            done = (own >= 0) & (own < limit(h - 1, first, last, W))
            tl.store(s_at + wide(h - 1) * W, s, done)
            gated = before * by_pixel(s, PIXELS_LAST)
            pool += tl.where(by_pixel(done, PIXELS_LAST), gated, 0.0)
            before = z
        to = pooled + wide(part * 2 + gate) * B * C
        store_per_image(to, pool, g, image, B, W, channel, C, TW, 1, PIXELS_LAST)


@triton.jit(do_not_specialize=RUN_TIME)
def channel_gates_kernel(
    partial,  # (parts, 2, B, C)
    weights,  # (2, C, C) float32
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
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        there = (image < B)[:, None] & (k < C)[None, :]
        mean = tl.zeros((BB, BK), tl.float32)
        for p in range(parts):
            at = partial + wide(p) * 2 * B * C + base
            mean += tl.load(at + row + k[None, :], there, 0.0)
        mean *= scale
        if tl.program_id(0) == 0:
            tl.store(pooled + base + row + k[None, :], mean, there)
        at = weights + gate * C * C + channel[None, :] * C + k[:, None]
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
        image, column, own = place(g, tile, B, W, TW, 2)
        q_at = qkv + offsets(image, column, channel, H, W, 3 * C, PIXELS_LAST)
        k_at = qkv + offsets(image, column, C + channel, H, W, 3 * C, PIXELS_LAST)
        v_at = qkv + offsets(image, column, 2 * C + channel, H, W, 3 * C, PIXELS_LAST)
        out_at = out + offsets(image, column, channel, H, W, C, PIXELS_LAST)
        s_at = spatial + maps(image, H, W, 2, 0) + column
        of_image = by_pixel(image.to(tl.int64) * C, PIXELS_LAST) + by_channel(channel, PIXELS_LAST)
        known = by_pixel(column >= 0, PIXELS_LAST) & there
        gate_q = tl.load(gates + of_image, known, 0.0)
        gate_k = tl.load(gates + wide(B) * C + of_image, known, 0.0)
        a_above = zeros(TW, BC, PIXELS_LAST)
        a_same = zeros(TW, BC, PIXELS_LAST)
        u_above = zeros(TW, BC, PIXELS_LAST)
        u_same = zeros(TW, BC, PIXELS_LAST)
        for h in tl.range(first - 2, last + 2, num_stages=STAGES):
            row = (column >= 0) & (column < limit(h, 0, H, W))
            inside = by_pixel(row, PIXELS_LAST) & there
            at = row_offset(h, W, 3 * C, PIXELS_LAST)
            q = tl.load(q_at + at, inside, 0.0).to(tl.float32)
            k = tl.load(k_at + at, inside, 0.0).to(tl.float32)
            row_before = (column >= 0) & (column < limit(h - 1, tl.maximum(first - 1, 0), H, W))
            v = tl.load(
                v_at + row_offset(h - 1, W, 3 * C, PIXELS_LAST),
                by_pixel(row_before, PIXELS_LAST) & there,
                0.0,
            ).to(tl.float32)
            s_q = tl.load(s_at + wide(h) * W, row, 0.0)
            s_k = tl.load(s_at + wide(H + h) * W, row, 0.0)
            a = q * by_pixel(s_q, PIXELS_LAST) * gate_q + k * by_pixel(s_k, PIXELS_LAST) * gate_k
            left, right = sides(a, TW, BC, PIXELS_LAST)
            hidden, a_above, a_same = convolve_row(a_above, a_same, left, a, right, dwc)
            u = (hidden + dwc_bias) * v
            left, right = sides(u, TW, BC, PIXELS_LAST)
            mixed, u_above, u_same = convolve_row(u_above, u_same, left, u, right, proj)
            done = (own >= 0) & (own < limit(h - 2, first, last, W))
            tl.store(
                out_at + row_offset(h - 2, W, C, PIXELS_LAST),
                (mixed + proj_bias).to(out.dtype.element_ty),
                by_pixel(done, PIXELS_LAST) & there,
            )
