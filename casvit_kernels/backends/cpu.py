"""The native library's kernels for the CPU, and the instruction sets it was built for."""

from __future__ import annotations

from . import native
from .base import Problem, why_not_dtype


class CpuBackend:
    name = "cpu"

    def why_not(self, problem: Problem | None = None) -> str | None:
        _, reason = native.load()
        if reason is not None or problem is None:
            return reason
        if problem.device != "cpu":
            return f"it computes on the CPU, the tensors are on {problem.device!r}"
        return why_not_dtype(problem)


def instruction_sets() -> dict[str, str | None]:
    """Every instruction set of this build, best first: None when usable here, else why not."""
    library, _ = native.load()
    if library is None:
        return {}
    names = library.casvit_cpu_isa_known().decode().split(",")
    return {n: library.casvit_cpu_isa_reason(n.encode()).decode() or None for n in names}


def active_instruction_set() -> str | None:
    """The instruction set in use; None without the native library.

    The best one that this CPU has, or what the environment variable CASVIT_KERNELS_CPU_ISA
    named when the library was loaded.
    """
    library, _ = native.load()
    return None if library is None else library.casvit_cpu_isa_active().decode()
