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
from casvit_kernels.ops.mixer.cuda import CudaKernels, Shape, channels_read, product
from casvit_kernels.ops.mixer.kernels import Mixed
from casvit_kernels.ops.mixer.weights import MixerWeights
from casvit_kernels.testing.cases import Target

NAME = "cuda_emulated"
DTYPES = (torch.bfloat16, torch.float16)
Given = dict[str, Tensor]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Emulated:
    """`cuda.Operators` in the emulation.

    Args:
        multiprocessors, shared, cluster: of the device that plans are made for; few multiprocessors, so
            that small maps are cut.
        launches: after the qkv product: 1, 2, or 0 for what the planner prefers.
        schedule: the first of the launches' schedules; each call takes the next.
        skip: a barrier's or wait's name, to do nothing.
    """

    def __init__(
        self,
        multiprocessors: int = 4,
        shared: int = 101376,
        schedule: int = 0,
        skip: str = "",
        cluster: int = 8,
        launches: int = 2,
    ) -> None:
        self.device = (multiprocessors, shared)
        self.cluster = cluster
        self.launches_wanted = launches
        self.device_of_mix: tuple[int, int] | None = None  # another one for it alone
        self.cut = [0, 0, 0, 0]  # of one launch, unless 0: rows, strips, slices, images
        self.schedule = schedule
        self.skip = skip
        self.races = True
        self.sites: dict[str, None] = {}
        self.launches: list[tuple[str, int]] = []  # kernels and the schedules that they ran in
        self.traffic: list[tuple[str, list[tuple[str, int, int]]]] = []  # of each launch

    def call(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: tuple[int, int] | None = None,
        **buffers: tuple[Tensor, bool],
    ) -> Any:
        """The module's object for a call that may touch these buffers; and whether it may write."""
        from cuda_emulation.build import module

        if buffers:  # it launches
            self.schedule = (self.schedule + 1) % 3
        given = [
            (name, t.data_ptr(), t.numel() * t.element_size(), writable)
            for name, (t, writable) in buffers.items()
        ]
        module().set_launches(self.launches_wanted)
        return module().MixerCall(
            list(shape),
            dtype is torch.float16,
            *(device or self.device),
            self.cluster,
            self.cut,
            self.schedule,
            self.schedule,
            self.races,
            self.skip,
            given,
        )

    def _done(self, call: Any) -> None:
        self.sites |= dict.fromkeys(call.sites())
        self.traffic += call.traffic()
        self.launches += [(name, self.schedule) for name, _ in call.traffic()]

    def pack(
        self,
        w: MixerWeights,
        statistics: Tensor | None,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        return self._pack("packed_words", "pack", w, statistics, eps, dtype)

    def pack_backward(
        self,
        w: MixerWeights,
        statistics: Tensor | None,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        return self._pack("backward_packed_words", "pack_backward", w, statistics, eps, dtype)

    def _pack(
        self,
        size: str,
        how: str,
        w: MixerWeights,
        statistics: Tensor | None,
        eps: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        c = w.dwc_bias.shape[0]
        packed = torch.full((getattr(_module(), size)(c), 4), float("nan"))
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
        of = 0 if statistics is None else statistics.data_ptr()
        getattr(call, how)(pointers, of, *eps, packed.data_ptr())
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
        device = self.device_of_mix
        parts = self.call(shape, rows.dtype, device).parts()[0]
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
            device,
            qkv=(rows, False),
            packed=(packed, False),
            **{name: (t, True) for name, t in results.items()},
        )
        pointers = (t.data_ptr() for t in (rows, packed, *results.values()))
        call.mix(*pointers, channels_last)
        self._done(call)
        return Mixed(out, spatial, pooled, channel)

    def backward_fits(self, like: Tensor, shape: Shape) -> bool:
        try:
            self.call(shape, torch.bfloat16).backward_parts()
        except RuntimeError:
            return False
        return True

    def _run(
        self, what: str, shape: Shape, dtype: torch.dtype, given: Given, results: Given
    ) -> None:
        """given: read; results: written, too."""
        buffers = {name: (t, False) for name, t in given.items()}
        buffers |= {name: (t, True) for name, t in results.items()}
        call = self.call(shape, dtype, **buffers)
        getattr(call, what)(*(t.data_ptr() for t in (*given.values(), *results.values())))
        self._done(call)

    def backward_combine(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        channel: Tensor,
        grad: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        b, c, height, width = shape
        slices, bands, blocks, _, _ = self.call(shape, rows.dtype).backward_parts()
        own = channels_read(c)
        results = {
            "grad_qkv": torch.full((b, height, width, 3 * own), float("nan"), dtype=rows.dtype),
            "grad_sum": torch.full((b, height, width, own), float("nan"), dtype=rows.dtype),
            "pixel": torch.full((slices, b, 2, height, width), float("nan")),
            "channel_sums": torch.full((bands, 2, b, own), float("nan")),
            "weights": torch.full((blocks, 20, own), float("nan")),
        }
        given = {"qkv": rows, "packed": packed, "spatial": spatial, "gates": channel, "grad": grad}
        self._run("backward_combine", shape, rows.dtype, given, results)
        grad_qkv, grad_sum, pixel, sums, weights = results.values()
        return grad_qkv, grad_sum, pixel, sums, weights

    def backward_gate(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        pixel: Tensor,
        shift: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor]:
        blocks = self.call(shape, rows.dtype).backward_parts()[3]
        logit = torch.full(spatial.shape, float("nan"))
        sums = torch.full((blocks, 2, 2, channels_read(shape[1])), float("nan"))
        given = {
            "qkv": rows,
            "packed": packed,
            "spatial": spatial,
            "pixel": pixel.contiguous(),
            "shift": shift.contiguous(),
        }
        self._run("backward_gate", shape, rows.dtype, given, {"logit": logit, "sums": sums})
        return logit, sums

    def backward_depthwise(
        self,
        rows: Tensor,
        packed: Tensor,
        spatial: Tensor,
        logit: Tensor,
        channel: Tensor,
        shift: Tensor,
        coefficients: Tensor,
        grad_sum: Tensor,
        grad_qkv: Tensor,
        shape: Shape,
    ) -> Tensor:
        blocks = self.call(shape, rows.dtype).backward_parts()[4]
        weights = torch.full((blocks, 2, 10, channels_read(shape[1])), float("nan"))
        given = {
            "qkv": rows,
            "packed": packed,
            "spatial": spatial,
            "logit": logit,
            "gates": channel,
            "shift": shift.contiguous(),
            "coefficients": coefficients.contiguous(),
            "grad_sum": grad_sum,
        }
        results = {"grad_qkv": grad_qkv, "weights": weights}
        self._run("backward_depthwise", shape, rows.dtype, given, results)
        return weights

    def infer(
        self, x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, packed: Tensor
    ) -> Tensor:
        b, c, height, width = x.shape
        rows = product(x, qkv_weight, qkv_bias)
        channels_last = not x.is_contiguous() and x.stride(1) == 1
        return self.mix(rows, packed, (b, c, height, width), channels_last).out


class EmulatedKernels(CudaKernels):
    """All of it emulated."""

    def __init__(self, operators: Emulated) -> None:
        super().__init__(NAME, operators)


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
