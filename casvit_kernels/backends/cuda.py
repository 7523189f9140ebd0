"""CUDA kernels: a name that is known and, in this version, never usable."""

from __future__ import annotations

from .base import Problem


class CudaBackend:
    name = "cuda"

    def why_not(self, problem: Problem | None = None) -> str | None:
        return "this version has no CUDA kernels yet"
