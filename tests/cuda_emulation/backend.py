"""The backend `cuda_emulated`: the CUDA kernels as host code, on CPU tensors. For tests, never chosen.

`register()` enters it, so that `backend=`, `use_backend` and the parity suite take it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from casvit_kernels import testing
from casvit_kernels.backends import Problem
from casvit_kernels.ops.mixer import kernels
from casvit_kernels.ops.mixer.cpu import CpuPhases
from casvit_kernels.ops.mixer.cuda import CudaKernels, CudaPhases, Shape, channels_read, product
from casvit_kernels.ops.mixer.kernels import Mixed
from casvit_kernels.ops.mixer.weights import MixerWeights
from casvit_kernels.testing.cases import Target

NAME = "cuda_emulated"
DTYPES = (torch.bfloat16, torch.float16)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Emulated:
    """`cuda.Operators` in the emulation.

    Args:
        multiprocessors, shared: of the device that plans are made for; few, so that small maps are cut.
        schedule: the first of the launches' schedules; each call takes the next.
        skip: a barrier's or wait's name, to do nothing.
    """

    def __init__(
        self, multiprocessors: int = 4, shared: int = 101376, schedule: int = 0, skip: str = ""
    ) -> None:
        self.device = (multiprocessors, shared)
        self.schedule = schedule
        self.skip = skip
        self.races = True
        self.sites: dict[str, None] = {}
        self.launches: list[tuple[str, int]] = []  # kernels and the schedules that they ran in
        self.traffic: list[tuple[str, list[tuple[str, int, int]]]] = []  # of the last call

    def call(self, shape: Shape, dtype: torch.dtype, **buffers: tuple[Tensor, bool]) -> Any:
        """The module's object for a call that may touch these buffers; and whether it may write."""
        from cuda_emulation.build import module

        if buffers:  # it launches
            self.schedule = (self.schedule + 1) % 3
        given = [
            (name, t.data_ptr(), t.numel() * t.element_size(), writable)
            for name, (t, writable) in buffers.items()
        ]
        return module().MixerCall(
            list(shape),
            dtype is torch.float16,
            *self.device,
            self.schedule,
            self.schedule,
            self.races,
            self.skip,
            given,
        )

    def _done(self, call: Any) -> None:
        self.sites |= dict.fromkeys(call.sites())
        self.traffic = call.traffic()
        self.launches += [(name, self.schedule) for name, _ in self.traffic]

    def pack(
        self,
        w: MixerWeights,
        statistics: Tensor | None,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        c = w.dwc_bias.shape[0]
        words = _module().packed_words(c)
        packed = torch.full((words, 4), float("nan"))
        weights = [
            t
            for g in (w.q, w.k)
            for t in (
                g.depthwise_weight,
                g.depthwise_bias,
                g.norm_weight,
                g.norm_bias,
                g.spatial_weight,
                g.channel_weight,
            )
        ]
        weights += [w.dwc_weight, w.dwc_bias, w.proj_weight, w.proj_bias]
        weights = [None if t is None else t.detach().contiguous() for t in weights]
        buffers = {f"weight {i}": (t, False) for i, t in enumerate(weights) if t is not None}
        buffers["packed"] = (packed, True)
        if statistics is not None:
            buffers["statistics"] = (statistics, False)
        call = self.call((1, c, 1, 1), dtype, **buffers)
        pointers = [(0, 0) if t is None else (t.data_ptr(), CODES[t.dtype]) for t in weights]
        call.pack(
            pointers, 0 if statistics is None else statistics.data_ptr(), *eps, packed.data_ptr()
        )
        self._done(call)
        return packed

    def statistics(self, rows: Tensor, packed: Tensor, shape: Shape) -> Tensor:
        c = shape[1]
        parts = self.call(shape, rows.dtype).parts()[1]
        counts = torch.full((parts,), float("nan"))
        moments = torch.full((parts, 2, 2, channels_read(c)), float("nan"))
        result = torch.full((2, 2, c), float("nan"))
        call = self.call(
            shape,
            rows.dtype,
            qkv=(rows, False),
            packed=(packed, False),
            counts=(counts, True),
            moments=(moments, True),
            result=(result, True),
        )
        call.statistics(*(t.data_ptr() for t in (rows, packed, counts, moments, result)))
        self._done(call)
        return result

    def mix(self, rows: Tensor, packed: Tensor, shape: Shape, channels_last: bool) -> Mixed:
        b, c, height, width = shape
        parts = self.call(shape, rows.dtype).parts()[0]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(shape, dtype=rows.dtype, memory_format=layout).fill_(float("nan"))
        sums = torch.full((parts, 2, b, channels_read(c)), float("nan"))
        spatial = torch.full((b, 2, height, width), float("nan"))
        pooled, channel = (torch.full((2, b, c), float("nan")) for _ in range(2))
        results = {
            "sums": sums,
            "spatial": spatial,
            "pooled": pooled,
            "channel": channel,
            "out": out,
        }
        call = self.call(
            shape,
            rows.dtype,
            qkv=(rows, False),
            packed=(packed, False),
            **{name: (t, True) for name, t in results.items()},
        )
        pointers = (t.data_ptr() for t in (rows, packed, *results.values()))
        call.mix(*pointers, channels_last)
        self._done(call)
        return Mixed(out, spatial, pooled, channel)

    def infer(
        self, x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, packed: Tensor
    ) -> Tensor:
        b, c, height, width = x.shape
        rows = product(x, qkv_weight, qkv_bias)
        channels_last = not x.is_contiguous() and x.stride(1) == 1
        return self.mix(rows, packed, (b, c, height, width), channels_last).out


class CpuBackward(CpuPhases):
    """The CPU's phases.

    In float16 they compute with q, k and v that are not rounded, so that gradients may differ from
    those of a GPU where a ReLU is nearly shut.
    """

    def adopt(self, rows: Tensor, x: Tensor, w: MixerWeights) -> Any:
        return self.project(x, w, rows.dtype)


class EmulatedKernels(CudaKernels):
    """The forward emulated; the backward by the CPU's kernels."""

    def __init__(self, operators: Emulated) -> None:
        super().__init__(NAME, operators)
        self.__dict__["phases"] = CudaPhases(operators, CpuBackward())


class EmulatedBackend:
    name = NAME

    def why_not(self, problem: Problem | None = None) -> str | None:
        if problem is None:
            return None
        if problem.device != "cpu":
            return f"it computes on the CPU, the tensors are on {problem.device!r}"
        if problem.dtype not in DTYPES:
            return f"it computes bfloat16 and float16, not {problem.dtype}"
        return None


def register(operators: Emulated | None = None) -> Emulated:
    """Enter the backend, behind all others, so that no automatic choice comes to it."""
    operators = operators or Emulated()
    registry = sys.modules["casvit_kernels.backends.registry"]
    registry._REGISTRY[NAME] = EmulatedBackend()
    kernels.register(EmulatedKernels(operators))
    testing.BACKENDS[NAME] = Target("cpu", DTYPES)
    return operators


def _module() -> Any:
    from cuda_emulation.build import module

    return module()
