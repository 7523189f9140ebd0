"""Which training images make up each step of a dense task, and batches of images of any sizes.

What a step sees depends on (seed, step) alone, as in `data`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .data import Unreadable, mixed, seeded
from .problem import Problem


class Draw(NamedTuple):
    """One image of a batch, and how many were drawn before it: what it is augmented by."""

    image: int
    count: int


class Steps(Sampler[list[Draw]]):
    """The batches of this process from step `start` to step ``total``; set `start` before iterating.

    Images come in an order that is drawn anew whenever all were seen.

    Args:
        images: how many there are.
        batch: images per step and process.
        total: steps.
        rank, world: of this process, and how many there are.
        seed: of the order.
    """

    def __init__(
        self, images: int, batch: int, total: int, rank: int, world: int, seed: int
    ) -> None:
        self.start = 0
        self._images, self._batch, self._total = images, batch, total
        self._rank, self._world, self._seed = rank, world, seed

    def __len__(self) -> int:
        return self._total - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        together = self._batch * self._world
        orders: dict[int, list[int]] = {}
        for step in range(self.start, self._total):
            first = step * together + self._rank
            counts = range(first, first + together - self._rank, self._world)
            rounds = {count // self._images for count in counts}
            orders = {r: orders[r] if r in orders else self._order(r) for r in rounds}
            yield [Draw(orders[c // self._images][c % self._images], c) for c in counts]

    def _order(self, round_: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed(self._seed, round_))
        order: list[int] = torch.randperm(self._images, generator=generator).tolist()
        return order


class Drawn(Dataset[Any]):
    """A data set under `Draw`s: ``load(image)`` and then ``augment``, from (seed, count) alone."""

    def __init__(self, source: Any, augment: Any, seed: int) -> None:
        self._source, self._augment, self._seed = source, augment, seed

    def __getitem__(self, draw: Draw) -> Any:
        item = self._source.load(draw.image)
        if isinstance(item, Unreadable):
            return item
        with seeded(self._seed, draw.count):
            return self._augment(*item)


class Share(Dataset[Any]):
    """Every ``world``-th image from ``rank``, with its number, for evaluation."""

    def __init__(self, source: Any, rank: int, world: int) -> None:
        self._source = source
        self._indices = range(rank, len(source), world)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Any:
        index = self._indices[position]
        item = self._source.load(index)
        return item if isinstance(item, Unreadable) else (index, *item)


def listed(items: list[Any]) -> Any:
    """A batch as a list, or what could not be read."""
    return next((item for item in items if isinstance(item, Unreadable)), items)


def batches(source: Any) -> Iterator[list[Any]]:
    """The batches of a loader that collates by `listed`.

    Raises:
        Problem: an image or what belongs to it cannot be read.
    """
    for batch in source:
        if isinstance(batch, Unreadable):
            raise Problem(batch.message)
        yield batch


def read_image(path: Any) -> Tensor | Unreadable:
    """``(3, H, W)`` uint8, or an `Unreadable`."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except Exception as error:  # what a damaged file makes the decoder raise can be anything
        return Unreadable(f"{path}: expected an image, got: {error}")
