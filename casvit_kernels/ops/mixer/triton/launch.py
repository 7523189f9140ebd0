"""How kernels are launched, as plan.py says.

What `recorded` collects is what a GPU would be given, so that the kernels can be compiled and counted
where there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backward, forward
from .plan import Plan, options

KERNELS: dict[str, Any] = {
    "statistics": forward.statistics_kernel,
    "merge_statistics": forward.merge_statistics_kernel,
    "gates": forward.gates_kernel,
    "channel_gates": forward.channel_gates_kernel,
    "combine": forward.combine_kernel,
    "backward_combine": backward.backward_combine_kernel,
    "backward_gate": backward.backward_gate_kernel,
    "backward_depthwise": backward.backward_depthwise_kernel,
}


class Launch(NamedTuple):
    """One launch: `arguments` at run time, `constants` and threads when it is compiled."""

    name: str  # in KERNELS
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    threads: int

    def options(self, warp: int) -> dict[str, Any]:
        """See `plan.options`."""
        return options(self.name, self.threads, warp)


# Of this thread: what others launch meanwhile runs.
_record: ContextVar[list[Launch] | None] = ContextVar("_record", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are collected and not run: for tensors of any device, "meta" too."""
    found: list[Launch] = []
    before = _record.set(found)
    try:
        yield found
    finally:
        _record.reset(before)


def launch(p: Plan, x: Tensor, *tensors: Any) -> None:
    """A kernel as planned, for maps like x. tensors: its arguments before the plan's sizes."""
    record = _record.get()
    if record is not None:
        arguments = (*tensors, *p.sizes)
        record.append(Launch(p.name, p.grid, arguments, p.constants, p.threads))
    elif p.one_device:
        KERNELS[p.name][p.grid](*tensors, *p.sizes, **p.keywords)
    else:
        with _device(x):
            KERNELS[p.name][p.grid](*tensors, *p.sizes, **p.keywords)


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of x."""
    if x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
