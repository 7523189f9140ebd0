"""What a launch of the CUDA kernels has to do, from how its maps are cut (csrc/cuda/plan.h): how often
a block's warps go round each loop, and the bytes that it asks for.

A warp counts as a whole where some of its threads have nothing to do, a block as whole where it lies
partly outside of the maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

KERNELS = ("gates", "statistics", "combine")
WARPS = 8  # of a block
LANES = 32
POSITIONS = 16  # of an mma
CHUNK = 4  # channels


class Shape(NamedTuple):
    batch: int
    channels: int
    height: int
    width: int

    @property
    def chunks(self) -> int:
        return _up(self.channels, CHUNK)

    @property
    def unit(self) -> int:
        """Bytes of one map in 16 bits."""
        return 2 * self.batch * self.channels * self.height * self.width


class Plan(NamedTuple):
    """Of a kernel, as the emulation's `MixerCall.plans()` gives it."""

    images: int
    strips: int
    rows: int
    pairs: int
    chunks: int
    bands: int
    columns: int
    halo: bool
    shared: int

    @property
    def own_rows(self) -> int:
        return self.strips * self.rows

    def slices(self, shape: Shape) -> list[int]:
        """The chunks of each slice of channels."""
        return [min(self.chunks, shape.chunks - i) for i in range(0, shape.chunks, self.chunks)]

    def tiles(self, pairs: int) -> int:
        """Of 16 positions: what one warp sweeps down."""
        return _up(self.images * self.strips * pairs, POSITIONS)

    def blocks(self, shape: Shape) -> int:
        """Of each slice, and of q or k where a block has but one of them."""
        return self.bands * self.columns * _up(shape.batch, self.images)


class Rounds(NamedTuple):
    """How often the warps of one block, taken together, do the work of a phase."""

    items: int  # of the instruction that stands for the phase's work
    around: tuple[int, ...]  # rounds of the loops around that work, the outermost first
    inside: int = 0  # rounds of a loop inside of it


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _walk(plan: Plan, chunks: int, pairs: int, rows: int) -> Rounds:
    columns = _up(2 * pairs * chunks, LANES)
    return Rounds(columns * plan.images * rows, (columns, columns * plan.images))


def _units(plan: Plan) -> int:
    return _up(plan.own_rows * (plan.pairs + 1), 32) * 32


def rounds(kernel: str, plan: Plan, shape: Shape, chunks: int, parts: int) -> dict[str, Rounds]:
    """By phase, for a block with so many chunks. parts: sums of the gates' kernel for each image."""
    tiles = plan.tiles(plan.pairs)
    if kernel == "combine":
        wide = plan.tiles(plan.pairs + 1)
        u_rows = plan.rows + 1 if plan.halo else plan.rows
        warps = [t * max(1, WARPS // t) for t in (wide, tiles)]
        steps, lines = _up(shape.channels, 16), 2 * plan.images
        words = lines * _up(8 * steps, LANES)  # of two channels
        tasks = 2 * _up(chunks, 2)  # of 8 channels of a gate
        return {
            "copy": _walk(plan, chunks, plan.pairs + 1, plan.own_rows + 2),
            "means": Rounds(words * parts, (lines, words)),
            "channel gates": Rounds(tasks * steps * 3, (tasks,)),
            "make a": _walk(plan, chunks, plan.pairs + 2, plan.own_rows + (4 if plan.halo else 2)),
            "sweep u": Rounds(wide * chunks * u_rows * 3, (warps[0],)),
            "sweep out": Rounds(tiles * chunks * plan.rows * 3, (warps[1],)),
            "store": _walk(plan, chunks, plan.pairs, plan.own_rows),
        }
    copy = {"copy": _walk(plan, chunks, plan.pairs + 1, plan.own_rows + 2)}
    sweep = tiles * chunks * plan.rows * 6
    if kernel == "statistics":
        return {**copy, "sweep": Rounds(sweep, (chunks,))}
    pixels = _up(plan.images * plan.own_rows * plan.pairs * 2, LANES)
    tasks = plan.images * _up(chunks, 2)  # of two chunks; an mma sums 16 units of one
    return {
        **copy,
        "zeros": Rounds(_up(plan.images * 2 * _units(plan), LANES), ()),
        "sweep": Rounds(sweep, ()),
        "pixels": Rounds(pixels, (), pixels * (WARPS // tiles - 1)),
        "pooled sums": Rounds(tasks * 2 * _units(plan) // 16, (tasks,)),
    }


def _inside(first: int, count: int, size: int) -> int:
    return max(0, min(first + count, size) - max(first, 0))


def _box(plan: Plan, shape: Shape, halo: int) -> Iterator[int]:
    """For each block of a slice: pixels of its box that lie in the maps."""
    for band in range(plan.bands):
        # A block that has all rows keeps no second halo, and has none to read.
        rows = _inside(band * plan.own_rows - halo, plan.own_rows + 2 * halo, shape.height)
        for column in range(plan.columns):
            width = 2 * plan.pairs
            across = _inside(column * width - halo, width + 2 * halo, shape.width)
            for image in range(0, shape.batch, plan.images):
                yield rows * across * min(plan.images, shape.batch - image)


def traffic(kernel: str, plan: Plan, shape: Shape, parts: int) -> dict[str, tuple[int, int]]:
    """Bytes that threads ask to read and write, by buffer, also where a cache serves them.
    Without what is written for a backward pass."""
    padded = shape.chunks * CHUNK
    pixels = shape.batch * shape.height * shape.width
    blocks = plan.blocks(shape)
    granule = 8
    if kernel != "combine":
        read = 2 * sum(_box(plan, shape, 1)) * shape.chunks * granule
        slices = plan.slices(shape)
        taps = LANES * 4 * 16 * 2 * blocks * sum(slices)
        if kernel == "statistics":
            moments = blocks * 2 * 2 * padded * 4
            return {
                "qkv": (read, 0),
                "packed": (taps, 0),
                "counts": (0, blocks * 4),
                "moments": (0, moments),
            }
        taps *= plan.tiles(plan.pairs)
        return {
            "qkv": (read, 0),
            "packed": (taps, 0),
            "spatial": (0, 2 * pixels * 4),
            "sums": (0, plan.bands * plan.columns * 2 * shape.batch * padded * 4),
        }
    a, u = sum(_box(plan, shape, 2)), sum(_box(plan, shape, 1))
    tiles = plan.tiles(plan.pairs) + plan.tiles(plan.pairs + 1)
    taps = LANES * 4 * 8 * tiles * blocks * shape.chunks
    first, channel = 0, 0
    for chunks in plan.slices(shape):
        tiles_of_8 = (first + chunks - 1) // 2 - first // 2 + 1
        channel += blocks * 2 * tiles_of_8 * _up(shape.channels, 16) * LANES * 16
        first += chunks
    means = plan.bands * plan.columns * shape.batch * 2 * padded * parts * 4
    return {
        "qkv": ((2 * a + u) * shape.chunks * granule, 0),
        "out": (0, pixels * shape.channels * 2),
        "packed": (taps + channel, 0),
        "spatial": (a * shape.chunks * 2 * 4, 0),
        "sums": (means * len(plan.slices(shape)), 0),
    }
