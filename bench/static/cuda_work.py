"""What a launch of a CUDA kernel has to do, from how its maps are cut (csrc/cuda/plan.h): how often
a block's warps go round each loop, and the bytes that it asks for.

Here is what all kernels share; a kernel is a `Kernel`, in cuda_forward.py or cuda_backward.py. A warp
counts as a whole where some of its threads have nothing to do, a block as whole where it lies partly
outside of the maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

WARPS = 8  # of a block
LANES = 32
POSITIONS = 16  # of an mma
CHUNK = 4  # channels
GRANULE = 8  # bytes of a pixel's chunk


class Shape(NamedTuple):
    batch: int
    channels: int
    height: int
    width: int

    @property
    def chunks(self) -> int:
        return up(self.channels, CHUNK)

    @property
    def padded(self) -> int:
        return self.chunks * CHUNK

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    @property
    def unit(self) -> int:
        """Bytes of one map in 16 bits."""
        return 2 * self.channels * self.pixels


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
        return up(self.images * self.strips * pairs, POSITIONS)

    def blocks(self, shape: Shape) -> int:
        """Of each slice, and of q or k where a block has but one of them."""
        return self.bands * self.columns * up(shape.batch, self.images)


class Launch(NamedTuple):
    """What work depends on."""

    shape: Shape
    plan: Plan
    parts: int  # sums of the gates' kernel for each image

    def box(self, halo: int) -> int:
        """Pixels in the maps that the blocks of a slice have, with so many around their own."""
        return sum(_boxes(self.plan, self.shape, halo))


class Rounds(NamedTuple):
    """How often the warps of one block, taken together, do the work of a phase; on average, where
    blocks differ."""

    items: float  # of the instruction that stands for the phase's work
    around: tuple[float, ...]  # rounds of the loops around that work, the outermost first
    inside: float = 0  # rounds of a loop inside of it
    other: float = 0  # rounds on the other side of the loop's fork


Traffic = dict[str, tuple[int, int]]  # bytes read and written, by buffer


class Rule(NamedTuple):
    """By what an outermost loop is told to be a phase: instructions as `sass.named` takes them."""

    names: tuple[str, ...]  # of several such loops in this order; none: such a loop does not run
    has: tuple[str, ...]  # all of these; the first stands for its work
    lacks: tuple[str, ...] = ()
    fork: bool = False  # a round does several pieces of the work, or on its other side one
    beside: tuple[str, str] | None = None  # the phase that loops beside the work are, and its work


class Kernel(NamedTuple):
    """What is to be known of one kernel."""

    name: str
    source: str  # the file that launches it
    arguments: str  # their type, by which the emulation calls a launch
    gates: int  # blocks for q and for k: 2; for both: 1
    units: int  # maps to and from device memory
    maps: tuple[str, ...]  # buffers that are maps
    rules: tuple[Rule, ...]  # the first that fits counts
    rounds: Callable[[Launch, int], dict[str, Rounds]]  # by phase, of a block with so many chunks
    traffic: Callable[[Launch], Traffic]  # also where a cache serves it

    @property
    def forks(self) -> list[str]:
        """Phases whose rounds take several rows or one."""
        return [name for rule in self.rules if rule.fork for name in rule.names]


def up(a: int, b: int) -> int:
    return -(-a // b)


class Box(NamedTuple):
    """What a block visits: from its own first row and pixel so many further, and how many."""

    above: int
    rows: int
    left: int
    pairs: int


def walk(launch: Launch, chunks: int, box: Box) -> Rounds:
    """Threads keep a chunk and step over columns, images, rows: all rows of a sweep at once where they
    lie in the maps, else one. A warp takes both ways where its threads do."""
    shape, plan, _ = launch
    inside = outside = 0  # images of a block
    for first in range(0, shape.batch, plan.images):
        inside += min(plan.images, shape.batch - first)
        outside += max(0, first + plan.images - shape.batch)
    ways = [_ways_down(plan, shape.height, band, box) for band in range(plan.bands)]
    fast, alone = (sum(n) for n in zip(*ways, strict=True))
    one_by_one = plan.bands * box.rows
    steps = [_steps(plan, shape.width, chunks, column, box) for column in range(plan.columns)]
    only_in, mixed, only_out = (sum(s[i] for s in steps) for i in range(3))
    both, every = only_in + mixed, only_in + mixed + only_out
    singles = inside * (only_in * alone + (mixed + only_out) * one_by_one)
    blocks = plan.blocks(shape)
    images = plan.bands * (inside + outside)
    return Rounds(
        inside * both * fast * plan.rows / blocks,
        (WARPS * up(chunks, WARPS * LANES), every / plan.columns, every * images / blocks),
        other=(singles + outside * every * one_by_one) / blocks,
    )


def _ways_down(plan: Plan, height: int, band: int, box: Box) -> tuple[int, int]:
    """Of a column in the maps: rounds of several rows, and of one."""
    row = band * plan.own_rows - box.above
    end = row + box.rows
    fast = alone = 0
    while row < end:
        whole = 0 <= row <= min(end, height) - plan.rows
        fast, alone = fast + whole, alone + (not whole)
        row += plan.rows if whole else 1
    return fast, alone


def _steps(plan: Plan, width: int, chunks: int, column: int, box: Box) -> tuple[int, int, int]:
    """A block's warps over columns: steps in the maps with all threads, with some, with none."""
    across = min(chunks, WARPS * LANES)
    step = WARPS * LANES // across
    found = [0, 0, 0]
    for warp in range(WARPS):
        first, last = (n // across for n in (warp * LANES, warp * LANES + LANES - 1))
        rounds = up(chunks - warp * LANES, across) if chunks > across else 1
        for at in range(first, 2 * box.pairs if first < step else 0, step):
            x = column * 2 * plan.pairs - box.left + at
            count = min(last, step - 1, 2 * box.pairs - 1 - at + first) - first + 1
            there = _inside(x, count, width)
            found[0 if there == count else 1 if there else 2] += rounds
    return found[0], found[1], found[2]


def sweep(plan: Plan, chunks: int, tiles: int, rows: int, each: int) -> Rounds:
    """A warp at a time takes a tile and some of the chunks, and sweeps down; mma of each row."""
    return Rounds(tiles * chunks * rows * each, (tiles * max(1, WARPS // tiles),))


def _inside(first: int, count: int, size: int) -> int:
    return max(0, min(first + count, size) - max(first, 0))


def _boxes(plan: Plan, shape: Shape, halo: int) -> Iterator[int]:
    for band in range(plan.bands):
        # A block that has all rows keeps no second halo, and has none to read.
        rows = _inside(band * plan.own_rows - halo, plan.own_rows + 2 * halo, shape.height)
        for column in range(plan.columns):
            width = 2 * plan.pairs
            across = _inside(column * width - halo, width + 2 * halo, shape.width)
            for image in range(0, shape.batch, plan.images):
                yield rows * across * min(plan.images, shape.batch - image)
