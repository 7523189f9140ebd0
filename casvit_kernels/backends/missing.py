"""A backend whose kernels this version does not carry: known by name, never usable."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..reference import MixerWeights
from .base import Problem


class MissingBackend:
    phases = None

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def why_not(self, problem: Problem | None = None) -> str:
        return self._reason

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> NoReturn:
        raise RuntimeError(f"{self.name}: {self._reason}")

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Tensor | None
    ) -> NoReturn:
        raise RuntimeError(f"{self.name}: {self._reason}")
