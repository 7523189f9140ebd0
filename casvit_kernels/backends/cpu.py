"""The fused CPU kernels of `csrc/cpu`, reached through the operators of `ops.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, ops
from ..reference import MixerWeights
from .base import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def instruction_sets() -> dict[str, str | None]:
    """Every instruction set of this build, best first: None when usable here, else why not."""
    library, _ = _native.load()
    if library is None:
        return {}
    names = library.casvit_cpu_isa_known().decode().split(",")
    return {n: library.casvit_cpu_isa_reason(n.encode()).decode() or None for n in names}


def active_instruction_set() -> str | None:
    """The instruction set in use; None without the native library.

    The best one that this CPU has, or what the environment variable CASVIT_KERNELS_CPU_ISA
    named when the library was loaded.
    """
    library, _ = _native.load()
    return None if library is None else library.casvit_cpu_isa_active().decode()


class CpuBackend:
    name = "cpu"

    def why_not(self, problem: Problem | None = None) -> str | None:
        _, reason = _native.load()
        if reason is not None or problem is None:
            return reason
        if problem.device != "cpu":
            return f"it computes on the CPU, the tensors are on {problem.device!r}"
        if problem.dtype not in DTYPES:
            return f"it computes float32, bfloat16 and float16, not {problem.dtype}"
        return None

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> Tensor:
        return ops.pack(w, eps, dtype)

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Tensor | None
    ) -> Tensor:
        return ops.project_and_mix(x, w, eps, packed)
