"""How the CUDA kernels would cut a mixer's maps on a GPU, which need not be here.

The planner is `csrc/cuda/plan.h`: it takes the cut that costs the fewest instructions, counted from
machine code, of those that fit into shared memory.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any, NamedTuple

from ...backends import cuda


class Device(NamedTuple):
    """What a plan depends on."""

    name: str
    multiprocessors: int
    shared_per_block: int  # bytes that a block may ask for
    shared_per_multiprocessor: int
    cluster: int  # blocks that may share their memory


# A GPU of each architecture that the library has machine code for.
DEVICES = {
    "sm_80": Device("A100", 108, 166912, 167936, 1),
    "sm_90": Device("H100", 132, 232448, 233472, 8),
    "sm_100": Device("B200", 148, 232448, 233472, 8),
    "sm_120": Device("RTX 5090", 170, 101376, 102400, 8),
}


def plan(shape: tuple[int, int, int, int], device: Device) -> list[dict[str, Any]]:
    """A dictionary for each kernel: its cut, or the ``reason`` why it takes no such maps.

    Args:
        shape: ``(B, C, H, W)`` of the mixer's input.
        device: see `DEVICES`.

    Returns:
        For each of gates, statistics, combine, single_pass (gates and combine in one launch),
        backward_combine, backward_gate, backward_depthwise: ``images``, ``rows``, ``columns`` (pixels)
        and ``channels`` of a block; ``halo``: whether rows above and below are other blocks';
        ``sweep_rows`` of a warp; ``shared_bytes`` of a block; ``blocks`` of the launch and of a
        ``cluster``; ``warp_instructions`` of a multiprocessor, estimated; ``chosen``: false for what a
        call does not launch.

    Raises:
        ValueError: a size is out of range.
        BackendUnavailable: the library has no CUDA kernels.
    """
    for name, size in zip(("batch", "dim", "height", "width"), shape, strict=True):
        if not 1 <= size <= 2**30:
            raise ValueError(f"shape: expected {name} of 1 to 2^30, got {size}")
    numbers = (ctypes.c_int * 8)(*shape, *device[1:])
    found: list[dict[str, Any]] = json.loads(cuda.library().casvit_cuda_plan(numbers))
    return found
