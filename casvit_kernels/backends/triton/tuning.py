"""How kernels are cut: tile sizes by kernel, channels, dtype and layout; rows and images by size.

Fixed by these tables and rules, never measured at run time: the first call does not stall, processes
that start together do not race, and equal inputs give equal bits. Imports no triton.
"""

from __future__ import annotations

from typing import NamedTuple

FEW_PROGRAMS = 256  # below it, images are cut into bands of rows
MANY_PROGRAMS = (
    1024  # above it, a program takes several small images and reads weights once for them
)
SMALLEST_BAND = 8  # rows; a band reads up to four rows more than it owns
MOST_REPEATS = 8
SMALL_IMAGE = 32 * 32  # pixels


class Tile(NamedTuple):
    """Compile-time constants of a kernel."""

    pixels: int  # lanes, TW in the kernels
    channels: int  # BC
    threads: int
    stages: int  # rows under way between memory and registers


class Cut(NamedTuple):
    """Run-time sizes of a launch."""

    programs: int  # along the first axis of the grid
    rows: int  # of a band
    repeat: int  # groups of images that a program takes in turn
    parts: int  # programs that share an image


HALO = {
    "statistics": 1,
    "gates": 1,
    "combine": 2,
    "backward_combine": 2,
    "backward_gate": 1,
    "backward_depthwise": 2,
}
BLOCK = 16  # of the kernels of small matrices, in either direction
# For kernels whose tile holds some of the channels.
_BY_CHANNELS = {
    "statistics": Tile(32, 32, 128, 3),
    "combine": Tile(32, 16, 64, 3),
    "backward_combine": Tile(32, 16, 256, 1),
    "backward_depthwise": Tile(32, 16, 256, 1),
}


def tile(kernel: str, channels: int, pixels_last: bool = False) -> Tile:
    """The tile of a kernel for maps of so many channels, NCHW where pixels_last."""
    if kernel in _BY_CHANNELS:
        return _BY_CHANNELS[kernel]
    padded = max(16, 1 << (channels - 1).bit_length())
    pixels = min(32, max(8, 4096 // padded))
    threads = min(512, pixels * padded // 8)
    # Each row under way needs registers too, of which the backward has few.
    stages = 3 if kernel == "gates" else 1 if pixels_last else 2
    return Tile(pixels, padded, threads, stages)


def cut(kernel: str, channels: int, images: int, height: int, width: int) -> Cut:
    """How many programs share B images of H x W pixels; as `tile.layout` counts them."""
    lanes, per_tile, *_ = tile(kernel, channels)
    halo = HALO[kernel]
    together = max((lanes + 1) // (width + 1), 1)
    tiles = 1 if width <= lanes else -(-width // (lanes - 2 * halo))
    groups = -(-images // together)
    programs = groups * tiles * -(-channels // per_tile)
    bands = min(-(-FEW_PROGRAMS // programs), -(-height // SMALLEST_BAND))
    rows = -(-height // bands)
    parts = tiles * -(-height // rows)
    repeat = 1
    if height * width <= SMALL_IMAGE:
        repeat = min(MOST_REPEATS, max(1, programs // MANY_PROGRAMS))
    return Cut(-(-groups // repeat) * parts, rows, repeat, parts)
