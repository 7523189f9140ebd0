"""What a network is beside its weights: stages, channels, outputs; and how many weights it takes.

May import: nothing of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# What comes behind the last stage.
MAPS, MAP, POOLED, LOGITS = range(4)  # nothing; its map, normed; the mean of that; a classifier


class Stage(NamedTuple):
    """Blocks of one resolution."""

    channels: int
    hidden: tuple[int, ...]  # of each block the hidden channels of its Mlp
    returned: bool  # whether the map behind them is an output


class Plan(NamedTuple):
    """A network; with its flat weights (see `fold.flat`) all that kernels need."""

    in_chans: int
    stem: int  # channels between the two convolutions of the stem
    normalized: bool  # whether the weights take images in [0, 1], with their means at the padding
    stages: tuple[Stage, ...]
    head: int  # MAPS, MAP, POOLED or LOGITS
    classes: int  # 0 but for LOGITS

    def to_ints(self) -> list[int]:
        """As the native operators take it."""
        ints = [self.in_chans, self.stem, int(self.normalized), len(self.stages)]
        for stage in self.stages:
            ints += [stage.channels, len(stage.hidden), int(stage.returned), *stage.hidden]
        return [*ints, self.head, self.classes]

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> Plan:
        """The inverse of `to_ints`."""
        left = iter(ints)
        in_chans, stem, normalized, count = (next(left) for _ in range(4))
        stages = []
        for _ in range(count):
            channels, depth, returned = (next(left) for _ in range(3))
            stages.append(Stage(channels, tuple(next(left) for _ in range(depth)), bool(returned)))
        return cls(in_chans, stem, bool(normalized), tuple(stages), next(left), next(left))

    def output_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        """Of an input ``(batch, in_chans, height, width)``; the maps fine to coarse, then the head's.

        The sizes may be symbols of a compiler.
        """
        shapes: list[tuple[int, ...]] = []
        height, width = _half(height), _half(width)
        for stage in self.stages:
            height, width = _half(height), _half(width)
            if stage.returned:
                shapes.append((batch, stage.channels, height, width))
        last = self.stages[-1].channels
        if self.head == MAP:
            shapes.append((batch, last, height, width))
        elif self.head == POOLED:
            shapes.append((batch, last))
        elif self.head == LOGITS:
            shapes.append((batch, self.classes))
        return shapes

    def weight_count(self) -> int:
        """How many numbers `fold.flat` gives."""
        return sum(self._counts())

    def _counts(self) -> Iterator[int]:
        if self.normalized:
            yield self.in_chans
        first = self.stages[0].channels
        yield self.stem * (9 * self.in_chans + 1) + first * (9 * self.stem + 1)
        before = 0
        for stage in self.stages:
            c = stage.channels
            if before:
                yield c * (9 * before + 1)
            depthwise = 10 * c
            local = 2 * (c * c + c) + depthwise
            mixer = 3 * c * (c + 1) + 2 * (depthwise + c + c * c) + 2 * depthwise
            for hidden in stage.hidden:
                yield local + mixer + 2 * hidden * c + hidden + c
            if stage.returned:
                yield 2 * c
            before = c
        if self.head in (MAP, POOLED):
            yield 2 * before
        elif self.head == LOGITS:
            yield self.classes * (before + 1)


def _half(size: int) -> int:
    return (size + 1) // 2
