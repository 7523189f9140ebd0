"""Which of `cuda` and `triton` comes first on an NVIDIA GPU where both can serve a call.

As measured on a GPU of its compute capability; where none was measured, as the static model of the
kernels' machine code predicts for the newest architecture up to its own. The numbers are in
gpu_numbers.py, which `python bench/report` makes of the results that are committed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .gpu_numbers import MEASURED, PREDICTED


class GpuOrder(NamedTuple):
    first: str  # "cuda" or "triton"
    measured: bool
    why: str


def order(capability: tuple[int, int]) -> GpuOrder:
    """For a compute capability."""
    if capability in MEASURED:
        gpu, ratio, count = MEASURED[capability]
        why = (
            f"measured on {gpu}: triton takes {ratio:.2f} times as long as cuda "
            f"(geometric mean of {count} timings)"
        )
        return GpuOrder("cuda" if ratio >= 1 else "triton", True, why)
    known = max((c for c in PREDICTED if c <= capability), default=min(PREDICTED))
    cuda, triton = PREDICTED[known]
    why = (
        f"predicted by the static model for sm_{known[0]}{known[1]}, not measured: {cuda:.0f} "
        f"instructions an output against triton's estimated {triton:.0f}"
    )
    return GpuOrder("cuda" if cuda <= triton else "triton", False, why)


def orders() -> list[tuple[str | None, tuple[int, int], GpuOrder]]:
    """Name, compute capability and order of each GPU here; where there is none (the name is None), of
    each capability that there are numbers of."""
    found = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in _gpus()]
    known = [(None, capability) for capability in sorted(PREDICTED.keys() | MEASURED.keys())]
    return [(name, capability, order(capability)) for name, capability in found or known]


def triton_first(ordinal: int | None) -> bool:
    """Whether `triton` stands before `cuda` on this GPU; None: on the newest."""
    which = _gpus() if ordinal is None else [i for i in _gpus() if i == ordinal]
    newest = max(map(torch.cuda.get_device_capability, which), default=None)
    return newest is not None and order(newest).first == "triton"


def _gpus() -> range:
    """NVIDIA's that this PyTorch can use."""
    usable = torch.version.hip is None and torch.cuda.is_available()
    return range(torch.cuda.device_count() if usable else 0)
