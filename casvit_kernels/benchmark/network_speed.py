"""A whole network on the CPU: how exact each candidate is, how fast, and how near to the CPU's peak."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..testing import FACTOR
from .candidates import NETWORK
from .macs import macs
from .network import names_for
from .peak import fma_peak
from .processes import Race, race
from .timer import BF16, Timing

CHUNK = 32  # images of float64 at a time
EPS = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps}


class Exactness(NamedTuple):
    """Outputs beside those of plain PyTorch in float64."""

    max_error: float
    same_top1: int  #: images with the same top class


@dataclass
class NetworkSpeed:
    """One network, batch and precision."""

    batch: int
    precision: str
    images: int  #: that exactness is of
    macs: int  #: of one image
    race: Race
    exactness: dict[str, Exactness]
    peaks: list[float] = field(default_factory=list)  #: multiply-adds a second, round by round

    @property
    def network(self) -> str:
        """The candidate that this is about."""
        return NETWORK + (BF16 if self.precision == "bf16" else "")

    @property
    def peak(self) -> float | None:
        """Multiply-adds a second; None where they cannot be measured."""
        return max(self.peaks, default=None)

    def rivals(self) -> dict[str, Timing]:
        """Of those timed the ones that are not of this library."""
        return {n: t for n, t in self.race.timings.items() if not n.startswith("fused")}

    def ratio(self, name: str) -> float | None:
        """How many times as fast as the best rival a candidate is; None where there is no rival."""
        best = min((t.median for t in self.rivals().values()), default=None)
        return None if best is None else best / self.race.timings[name].median

    def share(self, name: str) -> float | None:
        """The rate of a candidate's multiply-adds over the peak."""
        if self.peak is None:
            return None
        return self.macs * self.batch / self.race.timings[name].median / self.peak


def time_network(
    model: nn.Module,
    x: Tensor,
    *,
    batch: int,
    precision: str = "fp32",
    names: Iterable[str] | None = None,
    onnx: Path | None = None,
    backend: str | None = None,
    rounds: int = 15,
    starts: int = 3,
    min_round_seconds: float = 0.05,
    pause_seconds: float = 0.05,
    progress: Callable[[str], object] | None = None,
) -> NetworkSpeed:
    """Compare with float64, then time; where a fused candidate is not exact nothing is timed.

    In fp32 and in bf16 a fused candidate's error may be `casvit_kernels.testing.FACTOR` times that of
    eager PyTorch in the same precision.

    Args:
        model: a classifier, plain, in eval mode, float32.
        x: ``(N, 3, H, W)`` float32, N a multiple of `batch`; photographs, where top classes shall mean
            something. The first `batch` are timed.
        precision: ``"fp32"`` or ``"bf16"``.
        names: out of `names_for`; None: all.
        onnx: the model's file for `batch` images, which ONNX Runtime and OpenVINO read.
        backend, rounds, starts, min_round_seconds, pause_seconds, progress: as for `race`.

    Raises:
        ValueError: ``precision`` is not known, or another argument does not fit, as for `race`.
    """
    if precision not in EPS:
        raise ValueError(f"precision: expected one of {', '.join(EPS)}, got {precision!r}")
    with torch.no_grad(), torch.inference_mode(False):
        double = copy.deepcopy(model).double()
        truth = torch.cat([double(part.double()) for part in x.split(CHUNK)])
        del double
    peaks: list[float] = []

    def gate(outputs: dict[str, Tensor]) -> str | None:
        return refusal(outputs, truth, precision)

    def between() -> None:
        found = fma_peak(precision, torch.get_num_threads())
        if found is not None:
            peaks.append(found)

    found = race(
        model,
        x,
        names_for(precision) if names is None else names,
        batch=batch,
        onnx=onnx,
        backend=backend,
        rounds=rounds,
        starts=starts,
        min_round_seconds=min_round_seconds,
        pause_seconds=pause_seconds,
        gate=gate,
        between=between,
        progress=progress,
    )
    exactness = {name: exactness_of(out, truth) for name, out in found.outputs.items()}
    counted = macs(model, (1, *x.shape[1:]))
    return NetworkSpeed(batch, precision, len(x), counted, found, exactness, peaks)


def exactness_of(out: Tensor, truth: Tensor) -> Exactness:
    """NaN where the output has one."""
    if out.shape != truth.shape:
        return Exactness(float("inf"), 0)
    error = (out.double() - truth).abs().max().item()
    return Exactness(error, int((out.argmax(1) == truth.argmax(1)).sum()))


def refusal(outputs: dict[str, Tensor], truth: Tensor, precision: str) -> str | None:
    """Why nothing may be timed, or None."""
    eager = "eager" + (BF16 if precision == "bf16" else "")
    if eager not in outputs:
        return f"nothing to compare with: {eager} is missing"
    # Not less than one ulp: PyTorch may have been exact by luck.
    ulp = EPS[precision] * truth.abs().max().item()
    own = max(exactness_of(outputs[eager], truth).max_error, ulp)
    failed = []
    for name, out in outputs.items():
        error = exactness_of(out, truth).max_error
        if name.startswith("fused") and not error <= FACTOR * own:  # NaN fails
            failed.append(f"{name}: max error {error:.3g}, PyTorch's own {own:.3g}")
    return f"parity failed, nothing was timed: {'; '.join(failed)}" if failed else None
