"""The mixer's Triton kernels: forward.py and backward.py on tile.py, cut by tuning.py.

phases.py launches them, through plan.py and launch.py, with weights that packed.py lays out;
precompile.py compiles them beforehand; traffic.py counts their bytes.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ...tracing import is_opaque
from ..autograd import mix_training
from ..kernels import Phases
from ..schema import Settings, library
from ..weights import MixerWeights, flatten
from .packed import Packed, pack


@functools.cache
def _phases() -> Any:
    """The module with the launches; it imports triton."""
    return importlib.import_module(f"{__name__}.phases")


def _computed_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _differentiates(x: Tensor, w: MixerWeights) -> bool:
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *flatten(w))
    )


class TritonKernels:
    name = "triton"

    @functools.cached_property
    def phases(self) -> Phases | None:
        phases: Phases = _phases().TritonPhases()
        return phases

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> Packed:
        return pack(w, dtype)

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Any
    ) -> Tensor:
        dtype = _computed_dtype(x)
        if _differentiates(x, w):
            settings = Settings(*eps, False, False, dtype, self.name, "")
            return mix_training(x, w, settings)[0]
        if packed is None:  # for this call, or within the graph that is being captured or compiled
            packed = pack(w, dtype)
        infer: Any = torch.ops.casvit_kernels.triton_infer if is_opaque() else _infer
        out: Tensor = infer(x, *packed, *eps, dtype)
        return out


def _infer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    vectors: Tensor,
    statistics: Tensor,
    eps_q: float,
    eps_k: float,
    dtype: torch.dtype,
) -> Tensor:
    packed = Packed(qkv_weight, qkv_bias, vectors, statistics)
    out: Tensor = _phases().infer(x, packed, (eps_q, eps_k), dtype)
    return out


library.impl("triton_infer", _infer, "CompositeExplicitAutograd")
