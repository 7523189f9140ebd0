"""What the kernels share: which pixels and channels a program's tile covers, and 3x3 taps on it.

A tile is one row of pixels ("lanes", TW of them) by BC channels; kernels stream rows through it. Its
last axis is the one whose elements are neighbours in memory: the pixels where PIXELS_LAST (NCHW),
else the channels (channels_last).

Where an image is narrower than the tile, several lie side by side with a column of zeros between
them; where it is wider, tiles overlap by HALO lanes on each side, which their neighbours own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wide(x):
    """A number in 64 bits; a loop's counter too, which the interpreter hands over as an int."""
    return tl.zeros((), tl.int64) + x


@triton.jit
def layout(W, TW: tl.constexpr, HALO: tl.constexpr):
    """Images in a tile, tiles in a row, lanes from an image to the next, halo lanes."""
    images = tl.maximum((TW + 1) // (W + 1), 1)
    halo = tl.where(W <= TW, 0, HALO)
    tiles = tl.cdiv(W, TW - 2 * halo)
    period = tl.where(W <= TW, W + 1, TW)
    return images, tiles, period, halo


@triton.jit
def place(group, tile, B, W, TW: tl.constexpr, HALO: tl.constexpr):
    """Image and column of each lane; the column is -1 where there is no pixel, and also in `own`
    where the pixel is another tile's."""
    images, _, period, halo = layout(W, TW, HALO)
    lane = tl.arange(0, TW)
    local = lane // period
    image = group * images + local
    column = tile * (TW - 2 * halo) - halo + lane % period
    column = tl.where((local < images) & (image < B) & (column < W), column, -1)
    own = tl.where((lane >= halo) & (lane < TW - halo), column, -1)
    image = tl.where(image < B, image, 0)
    return image, column, own


@triton.jit
def limit(row, low, high, W):
    """W where low <= row < high, else 0: with `column < limit` no pixel of other rows is touched."""
    return tl.where((row >= low) & (row < high), W, 0)


@triton.jit
def by_pixel(v, PIXELS_LAST: tl.constexpr):
    """A vector of lanes, ready to meet a tile."""
    if PIXELS_LAST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def by_channel(v, PIXELS_LAST: tl.constexpr):
    if PIXELS_LAST:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def over_pixels(t, PIXELS_LAST: tl.constexpr):
    """The sum of a tile over its lanes."""
    if PIXELS_LAST:
        return tl.sum(t, axis=1)
    else:
        return tl.sum(t, axis=0)


@triton.jit
def over_channels(t, PIXELS_LAST: tl.constexpr):
    if PIXELS_LAST:
        return tl.sum(t, axis=0)
    else:
        return tl.sum(t, axis=1)


@triton.jit
def zeros(TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    if PIXELS_LAST:
        return tl.zeros((BC, TW), tl.float32)
    else:
        return tl.zeros((TW, BC), tl.float32)


@triton.jit
def offsets(image, column, channel, H, W, CHANNELS: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """Of row 0 of a tile in a map of CHANNELS channels, in elements; 64 bits wide."""
    image = image.to(tl.int64)
    if PIXELS_LAST:
        pixel = image * H * W * CHANNELS + column
        return by_pixel(pixel, PIXELS_LAST) + by_channel(channel.to(tl.int64) * H * W, PIXELS_LAST)
    else:
        pixel = (image * H * W + column) * CHANNELS
        return by_pixel(pixel, PIXELS_LAST) + by_channel(channel, PIXELS_LAST)


@triton.jit
def row_offset(row, W, CHANNELS: tl.constexpr, PIXELS_LAST: tl.constexpr):
    if PIXELS_LAST:
        return wide(row) * W
    else:
        return wide(row) * W * CHANNELS


@triton.jit
def maps(image, H, W, COUNT: tl.constexpr, which):
    """Offsets of row 0 of map `which` of COUNT of one channel each, contiguous."""
    return (image.to(tl.int64) * COUNT + which) * H * W


@triton.jit
def sides(t, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """The tile moved by one lane: at each pixel its left and its right neighbour, 0 outside."""
    lane = tl.arange(0, TW)
    before = by_pixel(tl.maximum(lane - 1, 0), PIXELS_LAST)
    after = by_pixel(tl.minimum(lane + 1, TW - 1), PIXELS_LAST)
    nothing = by_channel(tl.zeros((BC,), tl.int32), PIXELS_LAST)
    if PIXELS_LAST:
        left, right = tl.gather(t, before + nothing, 1), tl.gather(t, after + nothing, 1)
    else:
        left, right = tl.gather(t, before + nothing, 0), tl.gather(t, after + nothing, 0)
    left = tl.where(by_pixel(lane > 0, PIXELS_LAST), left, 0.0)
    right = tl.where(by_pixel(lane < TW - 1, PIXELS_LAST), right, 0.0)
    return left, right


@triton.jit
def taps(pointer, channel, C: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """The nine weights of a 3x3 depthwise convolution (C, 3, 3), ready to meet a tile."""
    p, there = pointer + channel * 9, channel < C
    return (
        by_channel(tl.load(p, there, 0.0), PIXELS_LAST),
        by_channel(tl.load(p + 1, there, 0.0), PIXELS_LAST),
        by_channel(tl.load(p + 2, there, 0.0), PIXELS_LAST),
        by_channel(tl.load(p + 3, there, 0.0), PIXELS_LAST),
        by_channel(tl.load(p + 4, there, 0.0), PIXELS_LAST),
        by_channel(tl.load(p + 5, there, 0.0), PIXELS_LAST),
        by_channel(tl.load(p + 6, there, 0.0), PIXELS_LAST),
        by_channel(tl.load(p + 7, there, 0.0), PIXELS_LAST),
        by_channel(tl.load(p + 8, there, 0.0), PIXELS_LAST),
    )


@triton.jit
def vector(pointer, channel, C: tl.constexpr, PIXELS_LAST: tl.constexpr, other=0.0):
    """(C,) float32, ready to meet a tile; `other` beyond C."""
    return by_channel(tl.load(pointer + channel, channel < C, other), PIXELS_LAST)


@triton.jit
def work(B, H, W, rows, repeat, TW: tl.constexpr, HALO: tl.constexpr):
    """What this program does: groups of images from one to another, one tile of columns, a band of
    rows from one to another; and its number among the programs that share its images."""
    images, tiles, _, _ = layout(W, TW, HALO)
    parts = tiles * tl.cdiv(H, rows)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts * repeat
    until = tl.minimum(group + repeat, tl.cdiv(B, images))
    first = part // tiles * rows
    return group, until, part % tiles, first, tl.minimum(first + rows, H), part


@triton.jit
def store_per_image(
    pointer,
    t,
    group,
    image,
    B,
    W,
    channel,
    C: tl.constexpr,
    TW: tl.constexpr,
    HALO: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
):
    """Write the sum over the lanes of each image of a tile to row `image` of a (B, C) matrix."""
    images, _, _, _ = layout(W, TW, HALO)
    for i in range(group * images, tl.minimum((group + 1) * images, B)):
        mine = tl.where(by_pixel(image == i, PIXELS_LAST), t, 0.0)
        row = wide(i) * C
        tl.store(pointer + row + channel, over_pixels(mine, PIXELS_LAST), channel < C)


@triton.jit
def convolve_row(above, same, left, mid, right, w):
    """Feed a row z(h) to a 3x3 convolution: the sum of row h-1 is complete, those of h and h+1 wait.

    above, same: what rows h-1 and h have so far. Returns the sums of rows h-1, h and h+1.
    """
    return (
        above + left * w[6] + mid * w[7] + right * w[8],
        same + left * w[3] + mid * w[4] + right * w[5],
        left * w[0] + mid * w[1] + right * w[2],
    )


@triton.jit
def convolve_back_row(above, same, left, mid, right, w):
    """The same for the gradient of a convolution at its input."""
    return (
        above + right * w[0] + mid * w[1] + left * w[2],
        same + right * w[3] + mid * w[4] + left * w[5],
        right * w[6] + mid * w[7] + left * w[8],
    )
