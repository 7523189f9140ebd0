"""Image folders, and which of their images make up each step, at which size.

What a step sees depends on (seed, epoch, step) alone: not on worker processes, and not on where a
run was interrupted.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from casvit_kernels._optional import need

from .problem import Problem


class Key(NamedTuple):
    """One image of a batch."""

    image: int  # its number in the folder
    epoch: int
    size: int  # pixels of the side


class Unreadable(NamedTuple):
    """In place of a batch: an exception from a worker process would bring its traceback along."""

    message: str


Item = tuple[Tensor, int] | Unreadable
Batch = tuple[Tensor, Tensor]


class Folder:
    """``root/<class>/<image>``: the classes and the paths, nothing opened yet.

    Raises:
        Problem: there is no such directory, or one of its classes has no image.
    """

    def __init__(self, root: Path) -> None:
        folders = need("torchvision.datasets.folder", "train")
        self.root = root
        if not root.is_dir():
            raise Problem(f"{root}: expected a folder of classes, got no such directory")
        self.classes: list[str] = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        if not self.classes:
            raise Problem(f"{root}: expected a folder per class, got none")
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.samples: list[tuple[str, int]] = folders.make_dataset(
            str(root), numbers, folders.IMG_EXTENSIONS, allow_empty=True
        )
        empty = set(range(len(self.classes))) - {label for _, label in self.samples}
        if empty:
            raise Problem(
                f"{root / self.classes[min(empty)]}: expected images in every class folder, got "
                f"none ({', '.join(folders.IMG_EXTENSIONS)} are looked for)"
            )

    def load(self, index: int) -> Any:
        """The image in RGB, or an `Unreadable`."""
        from PIL import Image

        path = self.samples[index][0]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # what a damaged file makes the decoder raise can be anything
            return Unreadable(f"{path}: expected an image, got: {error}")


def check_same_classes(train: Folder, val: Folder) -> None:
    """Raise `Problem` unless both folders have the same classes."""
    for one, other in ((train, val), (val, train)):
        missing = sorted(set(one.classes) - set(other.classes))
        if missing:
            raise Problem(
                f"{other.root}: expected the classes of {one.root}, got none for "
                f"{', '.join(missing[:4])}{' and others' if len(missing) > 4 else ''}"
            )


class Augmented(Dataset[Item]):
    """Training images under `Key`s, each augmented from (seed, epoch, index)."""

    def __init__(self, folder: Folder, transforms: dict[int, Any], seed: int) -> None:
        self._folder, self._transforms, self._seed = folder, transforms, seed

    def __getitem__(self, key: Key) -> Item:
        image = self._folder.load(key.image)
        if isinstance(image, Unreadable):
            return image
        with seeded(self._seed, key.epoch, key.image):
            return self._transforms[key.size](image), self._folder.samples[key.image][1]


class Plain(Dataset[Item]):
    """Every ``step``-th image from ``start``, for evaluation."""

    def __init__(self, folder: Folder, transform: Any, start: int, step: int) -> None:
        self._folder, self._transform = folder, transform
        self._indices = range(start, len(folder.samples), step)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Item:
        index = self._indices[position]
        image = self._folder.load(index)
        if isinstance(image, Unreadable):
            return image
        return self._transform(image), self._folder.samples[index][1]


class Plan(Sampler[list[Key]]):
    """The batches of an epoch; set `epoch` and `start` before iterating.

    All batches of a step, on every process, have one size, so that gradients weigh images equally;
    their batch size falls with the area. Every epoch has the same number of steps, and shows about
    as many images as there are.

    Args:
        images: how many there are.
        sizes: pixels of the side, drawn uniformly.
        input_size, batch: the size at which a process's batch has ``batch`` images.
        accumulate: batches per step and process.
        rank, world: of this process, and how many there are.
        seed: of the order and the sizes.
    """

    def __init__(
        self,
        images: int,
        sizes: Sequence[int],
        input_size: int,
        batch: int,
        accumulate: int,
        rank: int,
        world: int,
        seed: int,
    ) -> None:
        self.epoch = self.start = 0
        self._images, self._sizes, self._seed = images, tuple(sizes), seed
        # BatchNorm over a 1x1 map needs two images.
        self.batches = {size: max(2, round(batch * (input_size / size) ** 2)) for size in sizes}
        self._accumulate, self._rank, self._world = accumulate, rank, world
        per_step = accumulate * world * sum(self.batches.values()) / len(self.batches)
        self.steps = max(1, int(images / per_step))

    def __iter__(self) -> Iterator[list[Key]]:
        random_numbers = torch.Generator().manual_seed(mixed(self._seed, self.epoch))
        sizes = torch.randint(len(self._sizes), (self.steps,), generator=random_numbers).tolist()
        order, used = torch.empty(0, dtype=torch.int64), 0
        for step in range(self.steps):
            size = self._sizes[sizes[step]]
            count = self.batches[size] * self._accumulate * self._world
            while len(order) - used < count:
                again = torch.randperm(self._images, generator=random_numbers)
                order, used = torch.cat([order[used:], again]), 0
            now, used = order[used : used + count].tolist(), used + count
            if step < self.start:
                continue
            mine = [Key(index, self.epoch, size) for index in now[self._rank :: self._world]]
            for part in range(self._accumulate):
                yield mine[part :: self._accumulate]


def loader(
    dataset: Dataset[Any],
    workers: int,
    pin: bool,
    collate: Callable[[list[Any]], Any] | None = None,
    **batching: Any,
) -> DataLoader[Any]:
    """A loader that leaves the process's random generator alone."""
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        collate_fn=collate or _collate,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
        **batching,
    )


def batches(source: DataLoader[Item], device: torch.device) -> Iterator[Batch]:
    """The batches of a loader on ``device``.

    Raises:
        Problem: an image cannot be read.
    """
    for batch in source:
        if isinstance(batch, Unreadable):
            raise Problem(batch.message)
        images, labels = batch
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _collate(items: list[Item]) -> Batch | Unreadable:
    images, labels = [], []
    for item in items:
        if isinstance(item, Unreadable):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)


def _start_worker(_: int) -> None:
    # They may be sent to every process; the run ends its workers itself, after saving.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    # DataLoader looks who its parent is only after this, so it would wait forever, holding the
    # run's stderr open, for a run that was killed before.
    run = multiprocessing.parent_process()
    if run is not None:
        run.join()
        os._exit(1)


def mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """All generators that transforms draw from, seeded; outside they go on as if nothing was."""
    generator = torch.default_generator  # torch.manual_seed would reseed the GPUs too
    before = generator.get_state(), random.getstate(), np.random.get_state()
    seed = mixed(*numbers)
    generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
