"""What the kernels share: which pixels and channels a program's tile covers, and 3x3 taps on it.

A tile is one row of pixels ("lanes", TW of them) by BC channels; kernels stream rows through it. Its
last axis is the one whose elements are neighbours in memory: the pixels where PIXELS_LAST (NCHW),
else the channels (channels_last).

Where an image is narrower than the tile, several lie side by side with a column of zeros between
them; where it is wider, tiles overlap by HALO lanes on each side, which their neighbours own.

A tile is loaded, moved and stored as its even and its odd lanes: so a thread holds pairs of neighbours
and half as many channels, whose weights fill most registers; half the neighbours are at hand.

Offsets within a tile have 32 bits, what is common to the tile 64.
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
    """The first image of a tile; of each lane, the image counted from it and the column. The column
    is -1 where there is no pixel, and also in `own` where the pixel is another tile's."""
    images, _, period, halo = layout(W, TW, HALO)
    lane = tl.arange(0, TW)
    first = group * images
    local = lane // period
    column = tile * (TW - 2 * halo) - halo + lane % period
    there = (local < images) & (first + local < B)
    column = tl.where(there & (column < W), column, -1)
    own = tl.where((lane >= halo) & (lane < TW - halo), column, -1)
    return first, tl.where(there, local, 0), column, own


@triton.jit
def next_to(column, W, TW: tl.constexpr):
    """The columns of own pixels and of their neighbours, where the halo has two lanes; else -1."""
    lane = tl.arange(0, TW)
    return tl.where((W <= TW) | ((lane >= 1) & (lane < TW - 1)), column, -1)


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
def start(first, row, H, W, channel, CHANNELS: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """Of an image's row, from a channel on."""
    if PIXELS_LAST:
        return ((wide(first) * CHANNELS + channel) * H + row) * W
    else:
        return (wide(first) * H + row) * W * CHANNELS + channel


@triton.jit
def maps(local, column, H, W):
    """Offsets in maps (B, 2, H, W) of q's and k's gates, counted from `start_of_maps`."""
    return local * (2 * H * W) + column


@triton.jit
def start_of_maps(first, row, H, W, which):
    return ((wide(first) * 2 + which) * H + row) * W


@triton.jit
def pairs(t, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """The even and the odd lanes of a tile."""
    if PIXELS_LAST:
        return tl.split(tl.reshape(t, (BC, TW // 2, 2)))
    else:
        return tl.split(tl.permute(tl.reshape(t, (TW // 2, 2, BC)), (0, 2, 1)))


@triton.jit
def unpaired(even, odd, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    if PIXELS_LAST:
        return tl.reshape(tl.join(even, odd), (BC, TW))
    else:
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (TW, BC))


@triton.jit
def added(total, t, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """Add a tile to sums over lanes, kept for each pair of them."""
    even, odd = pairs(t, TW, BC, PIXELS_LAST)
    return total + even + odd


@triton.jit
def image_of_pair(local, column, TW: tl.constexpr):
    """No pair has pixels of two images: there is a column of zeros between them. -1: of none."""
    return tl.max(tl.reshape(tl.where(column >= 0, local, -1), (TW // 2, 2)), axis=1)


@triton.jit
def offsets(
    local,
    column,
    channel,
    H,
    W,
    CHANNELS: tl.constexpr,
    TW: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
):
    """In a map of CHANNELS channels, counted from `start`, for `load` and `store`."""
    if PIXELS_LAST:  # of even lanes alone, to have fewer addresses
        odd = tl.arange(0, TW) % 2
        image = tl.maximum(image_of_pair(local, column, TW), 0)
        pixel = tl.max(tl.reshape(column - odd, (TW // 2, 2)), axis=1) + image * (H * W * CHANNELS)
        return by_pixel(pixel, PIXELS_LAST) + by_channel(channel * (H * W), PIXELS_LAST)
    else:
        pixel = (local * (H * W) + column) * CHANNELS
        return by_pixel(pixel, PIXELS_LAST) + by_channel(channel, PIXELS_LAST)


@triton.jit
def load(pointer, at, mask, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """A tile; 0 where the mask is not."""
    if PIXELS_LAST:
        even_there, odd_there = pairs(mask, TW, BC, PIXELS_LAST)
        even = tl.load(pointer + at, even_there, 0.0)
        odd = tl.load(pointer + 1 + at, odd_there, 0.0)
        return unpaired(even, odd, TW, BC, PIXELS_LAST)
    else:
        return tl.load(pointer + at, mask, 0.0)


@triton.jit
def store(pointer, at, t, mask, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """A tile, in the dtype of the map."""
    t = t.to(pointer.dtype.element_ty)
    if PIXELS_LAST:
        even, odd = pairs(t, TW, BC, PIXELS_LAST)
        even_there, odd_there = pairs(mask, TW, BC, PIXELS_LAST)
        tl.store(pointer + at, even, even_there)
        tl.store(pointer + 1 + at, odd, odd_there)
    else:
        tl.store(pointer + at, t, mask)


@triton.jit
def moved(t, BY: tl.constexpr, LANES: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """At each lane what is BY lanes further, 0 outside."""
    lane = tl.arange(0, LANES) + BY
    index = by_pixel(tl.minimum(tl.maximum(lane, 0), LANES - 1), PIXELS_LAST)
    index += by_channel(tl.zeros((BC,), tl.int32), PIXELS_LAST)
    there = by_pixel((lane >= 0) & (lane < LANES), PIXELS_LAST)
    return tl.where(there, tl.gather(t, index, 1 if PIXELS_LAST else 0), 0.0)


@triton.jit
def from_left(t, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """At each pixel its left neighbour, 0 in the first lane."""
    even, odd = pairs(t, TW, BC, PIXELS_LAST)
    return unpaired(moved(odd, -1, TW // 2, BC, PIXELS_LAST), even, TW, BC, PIXELS_LAST)


@triton.jit
def from_right(t, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    even, odd = pairs(t, TW, BC, PIXELS_LAST)
    return unpaired(odd, moved(even, 1, TW // 2, BC, PIXELS_LAST), TW, BC, PIXELS_LAST)


@triton.jit
def convolve(above, mid, below, w, TW: tl.constexpr, BC: tl.constexpr, PIXELS_LAST: tl.constexpr):
    """The middle row of a 3x3 convolution of three rows, which may have any dtype."""
    above, mid, below = above.to(tl.float32), mid.to(tl.float32), below.to(tl.float32)
    to_right = above * w[0] + mid * w[3] + below * w[6]
    to_left = above * w[2] + mid * w[5] + below * w[8]
    stays = above * w[1] + mid * w[4] + below * w[7]
    left = from_left(to_right, TW, BC, PIXELS_LAST)
    return stays + left + from_right(to_left, TW, BC, PIXELS_LAST)


@triton.jit
def reverse(w):
    """The weights of a convolution's gradient at its input."""
    return w[8], w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0]


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
def load_per_image(
    pointer,
    first,
    local,
    column,
    channel,
    C: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
):
    """A tile of what a (B, C) matrix has for each image and channel; 0 where there is no pixel."""
    image = image_of_pair(local, column, TW)
    at = by_pixel(tl.maximum(image, 0) * C, PIXELS_LAST) + by_channel(channel, PIXELS_LAST)
    there = by_pixel(image >= 0, PIXELS_LAST) & by_channel(channel < C, PIXELS_LAST)
    pair = tl.load(pointer + wide(first) * C + at, there, 0.0)
    return unpaired(pair, pair, TW, BC, PIXELS_LAST)


@triton.jit
def store_per_image(
    pointer,
    sums,
    group,
    local,
    column,
    B,
    W,
    channel,
    C: tl.constexpr,
    TW: tl.constexpr,
    HALO: tl.constexpr,
    PIXELS_LAST: tl.constexpr,
):
    """Write what each image of a tile has in `sums`, which `added` made, to its row of (B, C)."""
    images, _, _, _ = layout(W, TW, HALO)
    image = image_of_pair(local, column, TW)
    first = group * images
    for i in range(tl.minimum(images, B - first)):
        mine = tl.where(by_pixel(image == i, PIXELS_LAST), sums, 0.0)
        row = wide(first + i) * C
        tl.store(pointer + row + channel, over_pixels(mine, PIXELS_LAST), channel < C)
