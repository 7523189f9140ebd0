"""How kernels are launched: their compile-time constants and options, in one place.

What `recorded` collects is what a GPU would be given, so that the kernels can be compiled and counted
where there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schema import output_memory_format
from . import backward, forward
from .tuning import BLOCK, BLOCK_CHANNELS, BLOCK_IMAGES, BLOCK_TERMS, SMALL_THREADS, Cut, tile

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

# Kernels that have as many warps where these are wider: with fewer a thread needs too many registers.
SAME_WARPS = ("combine", "backward_gate")


class Launch(NamedTuple):
    """One launch: `arguments` at run time, `constants` and threads when it is compiled."""

    name: str  # in KERNELS
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    threads: int

    def options(self, warp: int) -> dict[str, Any]:
        """For Triton's compiler. warp: threads of a warp, 64 on AMD's data-centre GPUs."""
        return {
            "num_warps": self.threads // (32 if self.name in SAME_WARPS else warp),
            "enable_fp_fusion": True,  # its default is to change
        }


_record: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are collected and not run: for tensors of any device, "meta" too."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(name: str, x: Tensor, size: Cut, given: Sequence[Any], gates: int = 1) -> None:
    """A kernel whose programs hold tiles of maps like x (B, C, H, W).

    given: its arguments before B. gates: 2 where a program has one of q and k.
    """
    b, c, height, width = x.shape
    pixels_last = output_memory_format(x) is torch.contiguous_format
    t = tile(name, c, pixels_last)
    together = max(1, min(b, (t.pixels + 1) // (width + 1)))
    # Offsets from the start of a row, and those within a tile of several images, have 32 bits.
    if 3 * c * height * width * together >= 2**31:
        raise ValueError(
            "x: expected images whose q, k and v have fewer than 2^31 elements together with "
            f"backend='triton', got shape {tuple(x.shape)}"
        )
    constants = {
        "C": c,
        "PIXELS_LAST": pixels_last,
        "TW": t.pixels,
        "BC": t.channels,
        "STAGES": t.stages,
    }
    grid = (size.programs, -(-c // t.channels), gates)
    arguments = (*given, b, height, width, size.rows, size.repeat)
    _run(x, Launch(name, grid, arguments, constants, t.threads))


def launch_small(
    name: str, x: Tensor, grid: tuple[int, int, int], arguments: Sequence[Any]
) -> None:
    """One of the kernels of small matrices, for maps like x."""
    constants = {"C": x.shape[1]}
    if name == "channel_gates":
        constants |= {"BB": BLOCK_IMAGES, "BC": BLOCK_CHANNELS, "BK": BLOCK_TERMS}
    else:
        constants["BLOCK"] = BLOCK
    _run(x, Launch(name, grid, tuple(arguments), constants, SMALL_THREADS[name]))


def _run(x: Tensor, it: Launch) -> None:
    if _record is not None:
        _record.append(it)
        return
    warp = 64 if torch.version.hip is not None else 32
    with _device(x):
        KERNELS[it.name][it.grid](*it.arguments, **it.constants, **it.options(warp))


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of x."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
