"""Triton kernels on NVIDIA and AMD GPUs; in Triton's interpreter on the CPU. Imports triton late."""

from __future__ import annotations

import functools
import importlib

import torch

from .base import Problem, why_not_dtype

OLDEST = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # NVIDIA's Ampere
_HINT = "; with TRITON_INTERPRET=1 set before Python starts it runs, slowly, on the CPU"
_INSTALL = "pip install 'triton>=3.6'"


class TritonBackend:
    name = "triton"

    def why_not(self, problem: Problem | None = None) -> str | None:
        interprets, reason = _triton()
        if reason is not None:
            return reason
        expected = "cpu" if interprets else "cuda"
        # First: to look at a GPU starts CUDA.
        if problem is not None and problem.device != expected:
            where = "in Triton's interpreter (TRITON_INTERPRET is set) " if interprets else ""
            reason = f"{where}it computes on {expected!r}, the tensors are on {problem.device!r}"
            return reason if interprets else reason + _HINT
        if not interprets:
            reason = _device(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            if reason is not None:
                return reason + _HINT
        return None if problem is None else why_not_dtype(problem)

    def why_not_compile(self, here: bool) -> str | None:
        """Why no kernel can be compiled. here: for a GPU of this machine."""
        interprets, reason = _triton()
        if reason is None and interprets:
            reason = "TRITON_INTERPRET is set: in that process nothing can be compiled"
        if reason is None and here:
            reason = _device(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            if reason is not None:
                reason += "; target='sm_90' compiles for a GPU that need not be here"
        return reason


@functools.cache
def _triton() -> tuple[bool, str | None]:
    """Whether triton interprets, and the reason why it cannot be used at all."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return False, f"triton cannot be imported ({error}): {_INSTALL}"
    version = tuple(int(p) for p in triton.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        return False, f"it needs triton 3.6 or later, found {triton.__version__}: {_INSTALL}"
    interprets = bool(triton.knobs.runtime.interpret)
    if interprets and version == (3, 6) and _numpy() >= (2, 4):
        return (
            interprets,
            "the interpreter of triton 3.6 needs an older numpy: pip install 'numpy<2.4'",
        )
    return interprets, None


def _numpy() -> tuple[int, ...]:
    import numpy

    return tuple(int(p) for p in numpy.__version__.split(".")[:2])


@functools.cache
def _device(count: int) -> str | None:
    """Why the GPUs here cannot be used. count: of them."""
    if count == 0:
        return "no GPU that this PyTorch can use: torch.cuda.is_available() is False"
    if torch.version.hip is not None:
        return None
    newest = max(range(count), key=torch.cuda.get_device_capability)
    capability = torch.cuda.get_device_capability(newest)
    if capability >= OLDEST_CAPABILITY:
        return None
    return (
        "it needs a GPU of compute capability 8.0 or later, the newest here, "
        f"{torch.cuda.get_device_name(newest)} (cuda:{newest}), has {capability[0]}.{capability[1]}"
    )
