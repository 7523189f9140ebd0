"""The fused CPU kernels of `csrc/cpu`, reached through the operators of `ops.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, ops
from ..reference import MixerWeights
from .base import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
