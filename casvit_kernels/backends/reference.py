"""The plain PyTorch formulas as a backend: any device, any floating dtype, exports."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..reference import MixerWeights
from .base import Problem


class ReferenceBackend:
    name = "reference"
    phases = None

    def why_not(self, problem: Problem | None = None) -> str | None:
        return None

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> None:
        return None

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Tensor | None
    ) -> Tensor:
        norms = reference.running_norm(w.q, eps[0]), reference.running_norm(w.k, eps[1])
        out = reference.catm(x, w, *norms)
        return out.contiguous(memory_format=ops.output_memory_format(x))
