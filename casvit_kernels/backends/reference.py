"""The plain PyTorch formulas as a backend: any device, any floating dtype, exports."""

from __future__ import annotations

from .base import Problem


class ReferenceBackend:
    name = "reference"

    def why_not(self, problem: Problem | None = None) -> str | None:
        return None
