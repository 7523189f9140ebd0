"""How kernels are cut: tile sizes by kernel, channels, dtype and layout; rows and images by size.

Fixed by these tables and rules, never measured at run time: processes that start together do not race,
and equal inputs give equal bits on GPUs with as many multiprocessors. Imports no triton.
"""

from __future__ import annotations

from typing import NamedTuple

FEW_PROGRAMS = 256  # below it, images are cut into bands of rows
SMALLEST_BAND = 8  # rows; a band reads up to four rows more than it owns
# A program takes several groups of images, and reads weights and writes their gradients once for them,
# until these are a small part of its traffic, but as evenly over the multiprocessors as may be.
MULTIPROCESSORS = 132  # where there is no GPU to ask: those of an H100
MOST_REPEATS = 8
SMALL_PART = 40  # one of so many parts
NEWEST = (3, 9)  # of the versions of Triton that tiles were chosen with


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
BLOCK_IMAGES, BLOCK_CHANNELS, BLOCK_TERMS = 32, 64, 32  # of the channel gates' product
BLOCK = 16  # of the merged statistics, programs and channels
SMALL_THREADS = {"channel_gates": 256, "merge_statistics": 128}
# Of a program: 4-byte values for each channel that do not depend on images; maps read and written.
_FIXED = {
    "statistics": (14, 1),
    "gates": (15, 1),
    "combine": (20, 4),
    "backward_combine": (59, 6),
    "backward_gate": (16, 1),
    "backward_depthwise": (76, 5),
}
PER_GATE = ("statistics", "gates", "backward_gate")  # q and k have programs of their own
# For kernels whose tile holds some of the channels.
_BY_CHANNELS = {
    "statistics": Tile(32, 32, 128, 3),
    "combine": Tile(32, 16, 64, 3),
    "backward_combine": Tile(32, 16, 256, 1),
    "backward_depthwise": Tile(32, 16, 256, 1),
}


def tile(
    kernel: str,
    channels: int,
    pixels_last: bool = False,
    itemsize: int = 2,
    triton: tuple[int, int] = NEWEST,
) -> Tile:
    """The tile of a kernel for maps of so many channels, NCHW where pixels_last, of so many bytes each.

    Its pixels and channels depend on the first two alone: cuts and buffers depend on them. triton: its
    version.
    """
    # Triton 3.6 takes more registers: where it would spill, fewer rows are under way.
    old = triton < (3, 7)
    if kernel in _BY_CHANNELS:
        found = _BY_CHANNELS[kernel]
        if kernel == "combine" and pixels_last and old:
            return found._replace(stages=1 if itemsize == 2 else 2)
        return found
    padded = max(16, 1 << (channels - 1).bit_length())
    pixels = min(32, max(8, 4096 // padded))
    # 512 threads have 128 registers each: too few in the backward, and in NCHW for Triton 3.6.
    most = 256 if kernel == "backward_gate" or pixels_last else 512
    threads = min(most, pixels * padded // 8)
    # Each row under way needs registers too; the largest tiles and the backward have few left.
    stages = 1 if pixels_last else 2
    if kernel == "gates" and pixels * padded < 4096:
        stages = 3
    if kernel == "backward_gate" and old and (padded == 256 or (padded == 512 and itemsize == 4)):
        stages = 1
    return Tile(pixels, padded, threads, stages)


def cut(
    kernel: str, channels: int, images: int, height: int, width: int, multiprocessors: int
) -> Cut:
    """How many programs share B images of H x W pixels; as `tile.layout` counts them."""
    lanes, per_tile, *_ = tile(kernel, channels)
    halo = HALO[kernel]
    together = max((lanes + 1) // (width + 1), 1)
    tiles = 1 if width <= lanes else -(-width // (lanes - 2 * halo))
    groups = -(-images // together)
    programs = groups * tiles * -(-channels // per_tile) * (2 if kernel in PER_GATE else 1)
    bands = min(-(-FEW_PROGRAMS // programs), -(-height // SMALLEST_BAND))
    rows = -(-height // bands)
    parts = tiles * -(-height // rows)
    fixed, maps = _FIXED[kernel]
    moved = maps * 2 * rows * (together * width if tiles == 1 else lanes)  # bytes, of 16 bits each
    most = min(-(-SMALL_PART * 4 * fixed // moved), MOST_REPEATS, groups)
    each = parts * programs // (groups * tiles)  # programs of a group

    def busiest(repeat: int) -> int:
        """Bytes a channel that the multiprocessor with the most to do moves."""
        return -(-(-(-groups // repeat) * each) // multiprocessors) * (4 * fixed + repeat * moved)

    repeat = min(range(1, max(most, 1) + 1), key=busiest)
    return Cut(-(-groups // repeat) * parts, rows, repeat, parts)
