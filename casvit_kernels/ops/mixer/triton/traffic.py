"""Bytes that the kernels ask for, counted from sizes alone; masked lanes ask for nothing.

The counts follow the kernels' masks, tiles, halos, bands and repeats exactly: a test compares them with
what the interpreter counts. Caches serve a part of them. Imports no triton.
"""

from __future__ import annotations

from typing import NamedTuple

from .tuning import BLOCK, BLOCK_CHANNELS, BLOCK_IMAGES, HALO, MULTIPROCESSORS, Cut, cut, tile

FLOAT = 4  # bytes of what is not a map


class Size(NamedTuple):
    """The maps of a mixer."""

    images: int  # B
    channels: int
    height: int
    width: int
    itemsize: int  # bytes of an element of a map
    small: int  # bytes of an element of e and es, the backward's maps of one channel
    multiprocessors: int = MULTIPROCESSORS

    @property
    def unit(self) -> int:
        """Bytes of one map."""
        return self.images * self.channels * self.height * self.width * self.itemsize


class _Lanes(NamedTuple):
    """Lanes with a pixel, summed over all tiles of one row of all images."""

    all: int
    beside: int  # own and their neighbours, as `tile.next_to`
    own: int
    pairs: int  # pairs of lanes of which one has a pixel


def _lanes(kernel: str, size: Size) -> _Lanes:
    """As `tile.place` says."""
    lanes = tile(kernel, size.channels).pixels
    width = size.width
    together = max((lanes + 1) // (width + 1), 1)
    halo = 0 if width <= lanes else HALO[kernel]
    period = width + 1 if width <= lanes else lanes
    counts = [0, 0, 0, 0]
    full, rest = divmod(size.images, together)
    for groups, images in ((full, together), (1, rest)):
        for number in range(-(-width // (lanes - 2 * halo))):
            column = [
                number * (lanes - 2 * halo) - halo + i % period if i // period < images else -1
                for i in range(lanes)
            ]
            there = [0 <= c < width for c in column]
            counts[0] += groups * sum(there)
            counts[1] += groups * sum(there[min(halo, 1) : lanes - min(halo, 1)])
            counts[2] += groups * sum(there[halo : lanes - halo])
            counts[3] += groups * sum(map(max, zip(there[::2], there[1::2], strict=True)))
    return _Lanes(*counts)


def _cut(kernel: str, size: Size) -> Cut:
    b, c, height, width = size[:4]
    return cut(kernel, c, b, height, width, size.multiprocessors)


def kernel_bytes(kernel: str, size: Size) -> int:
    """What one launch of a kernel reads and writes. kernel: a name in `launch.KERNELS`."""
    b, c, height, _, item, small_item, _ = size
    blocks = -(-c // BLOCK)
    if kernel == "merge_statistics":
        programs = _cut("statistics", size).programs
        # The numbers twice by every program; the means twice and the deviations once; the result.
        return FLOAT * (2 * 2 * blocks * programs + 2 * 3 * programs * c + 4 * c)
    if kernel == "channel_gates":
        parts = _cut("gates", size).parts
        means = 2 * parts * b * c * -(-c // BLOCK_CHANNELS)
        weights = 2 * c * c * -(-b // BLOCK_IMAGES)
        return FLOAT * (means + weights + 2 * 2 * b * c)
    programs, rows, _, parts = _cut(kernel, size)
    blocks = -(-c // tile(kernel, c).channels)
    lanes = _lanes(kernel, size)
    bands = -(-height // rows)

    def within(beyond: int) -> int:
        """Rows of all bands, with so many more at either end, inside the image."""
        return sum(
            min(start + rows, height) + beyond if start + rows + beyond <= height else height
            for start in range(0, height, rows)
        ) - sum(max(start - beyond, 0) for start in range(0, height, rows))

    whole = lanes.all * within(HALO[kernel])
    near = lanes.beside * within(1)
    done = lanes.own * within(0)  # each pixel once
    per_image = lanes.pairs * bands * c  # of one (B, C) matrix
    own_dtype = 0  # of maps of one channel, those of dtype `small`
    if kernel == "statistics":  # q and k: halves of each map; each has programs of its own
        maps, ones = 2 * whole, 0
        small = programs * (2 * 10 * c + 4 * c + 1)
    elif kernel == "gates":
        maps, ones = 2 * whole, 2 * done
        small = 2 * programs * 15 * c + 2 * parts * b * c
    elif kernel == "combine":
        maps, ones = 2 * whole + near + done, 2 * whole
        small = programs * 20 * c + 2 * per_image
    elif kernel == "backward_combine":
        maps = whole + 3 * near + 2 * done
        ones, own_dtype = 2 * near, 2 * done
        small = programs * (19 + 20) * c + 2 * per_image + 2 * parts * b * c
    elif kernel == "backward_gate":
        maps, ones, own_dtype = 2 * whole, 2 * 2 * done, 2 * done
        small = programs * 2 * (14 + 2) * c + 2 * per_image
    elif kernel == "backward_depthwise":
        maps = 2 * whole + 3 * done
        ones, own_dtype = 2 * done, 2 * near
        small = programs * (2 * (9 + 6 + 3) + 20) * c + 4 * per_image
    else:
        raise ValueError(f"kernel: expected a kernel with a count, got {kernel!r}")
    return item * maps * c + blocks * (FLOAT * ones + small_item * own_dtype) + FLOAT * small


def outside_bytes(size: Size) -> dict[str, int]:
    """The sums of what programs and channel blocks wrote, which PyTorch adds up: read and written."""
    b, c, height, width, _, small_item, _ = size
    first = _cut("backward_combine", size)
    blocks = -(-c // tile("backward_combine", c).channels)
    gate = _cut("backward_gate", size)
    last = _cut("backward_depthwise", size)
    pixels = 2 * b * height * width
    return {
        "backward_combine": (small_item * blocks + FLOAT) * pixels
        + FLOAT * ((first.parts + 1) * 2 * b * c + (first.programs + 1) * 20 * c),
        "backward_gate": FLOAT * (gate.programs + 1) * 4 * c,
        "backward_depthwise": FLOAT * (last.programs + 1) * 20 * c,
    }


FORWARD = ("gates", "channel_gates", "combine")
TRAINING_FORWARD = ("statistics", "merge_statistics", *FORWARD)
BACKWARD = ("backward_combine", "backward_gate", "backward_depthwise")


def units(size: Size) -> dict[str, float]:
    """By kernel, and in all, over the bytes of one map: q, k and v in and out once are 4 of them."""
    outside = outside_bytes(size)
    found = {
        kernel: (kernel_bytes(kernel, size) + outside.get(kernel, 0)) / size.unit
        for kernel in (*TRAINING_FORWARD, *BACKWARD)
    }
    found["training forward"] = sum(found[k] for k in TRAINING_FORWARD)
    found["backward"] = sum(found[k] for k in BACKWARD)
    return found
