"""One process or many (torchrun): who this is, sums over all of them, and how they are stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .problem import Problem


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor``, summed in place over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank."""
        values: list[Any] = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; nccl on CUDA, else gloo.

    Args:
        device: "cpu", "cuda" or "auto", CUDA where there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise Problem("--device: expected one that is there, got cuda and PyTorch finds no GPU")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise Problem(
                f"--nproc-per-node: expected at most one process per GPU, got process {local + 1} "
                f"with {torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local)
        place = torch.device("cuda", local)
    else:
        place = torch.device("cpu")
    if world == 1:
        yield Processes(rank, world, place)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Processes(rank, world, place)
    except RuntimeError as error:
        # The process that failed has said why; the others only miss it.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise Problem("another process has ended; see its message") from error
        raise
    finally:
        dist.destroy_process_group()


class StopRequest:
    """While entered, Ctrl-C and SIGTERM set `made`; a second one ends a lone process at once."""

    def __init__(self, alone: bool) -> None:
        self.made = False
        self._alone = alone  # torchrun repeats the signal that the terminal has sent already
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.made = True
        if self._alone:
            signal.signal(number, self._before[number])
