"""The judge: is a result as near to the float64 truth as plain PyTorch of the same dtype comes?

A backend passes where its error is at most a small factor times the error that the same plain PyTorch
code makes. Everything here works on tensors and knows no mixer. May import: torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.utils.deterministic
from torch import Tensor

# How many times PyTorch's own error the error may be. A gradient is a long sum with cancellation
# whose order is free: correct implementations differ by more there. Where PyTorch itself has no
# digit right (a gradient that vanishes identically, as of a bias before batch statistics) only
# its size counts.
FACTOR, GRADIENT_FACTOR, VANISHING_FACTOR = 2.0, 4.0, 16.0


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the context, memory that torch allocates and nobody wrote reads NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def without_tf32(device: str) -> Iterator[None]:
    """Within the context, float32 convolutions and products on a GPU keep all their digits."""
    if torch.device(device).type == "cpu":
        yield
        return
    convolution, product = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolution
        torch.backends.cuda.matmul.allow_tf32 = product


class Errors(NamedTuple):
    """Absolute errors of one tensor against the truth, all in units of its values."""

    largest: float
    rms: float
    norm: float  # root mean square of the result less that of the truth
    mean: float
    truth: float  # root mean square of the truth

    def times(self, scale: float) -> Errors:
        largest, rms, norm, mean = (scale * e for e in self[:4])
        return Errors(largest, rms, norm, mean, self.truth)

    def on_scale_of(self, truth: Tensor) -> Errors:
        """What these errors of another draw would be in a draw whose truth is smaller."""
        return self.times(min(1.0, divide(rms_of(truth), self.truth, 1.0)))


class Judged(NamedTuple):
    tensor: str
    max_error: float
    reference_error: float
    ratio: float
    cosine: float
    relative_norm: float
    bias: float
    failures: tuple[str, ...]
    of_limit: float  # ratio over the largest that passes


_NAN = math.nan
NOTHING = Judged("-", _NAN, _NAN, _NAN, _NAN, _NAN, _NAN, (), _NAN)


def bits(t: Tensor) -> Tensor:
    """The bits of a tensor, so that NaN equals NaN and -0 is not 0."""
    return t.detach().view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]
    )


def errors_of(got: Tensor, truth: Tensor) -> Errors:
    if truth.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0, 0.0)
    got, truth = got.detach().to(truth.device, torch.float64), truth.double()
    error = got - truth
    size = rms_of(truth)
    return Errors(
        error.abs().max().item(), rms_of(error), rms_of(got) - size, error.mean().item(), size
    )


def rms_of(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def judge(
    name: str, got: Tensor, truth: Tensor, own: list[Errors], dtype: torch.dtype, channels: int
) -> Judged:
    """Compare one tensor with the truth, as far as plain PyTorch's `own` errors allow.

    Every bound is a factor times plain PyTorch's own figure, the largest of its draws. No figure is
    taken as less than one ulp of the values it belongs to, where plain PyTorch was lucky or exact:
    storing the result costs half of that alone. (From float32 up, where a result is off by more
    roundings than its last, an element may always be off by `factor` squared ulps of the largest.)
    """
    if got.shape != truth.shape:
        text = f"{name}: expected shape {tuple(truth.shape)}, got {tuple(got.shape)}"
        return Judged(name, math.inf, 0.0, math.inf, 0.0, 0.0, math.inf, (text,), math.inf)
    if truth.numel() == 0:
        return Judged(name, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, (), 0.0)
    ulp = torch.finfo(dtype).eps
    error = errors_of(got, truth)
    size, largest = error.truth, truth.abs().max().item()
    rms = max(*(e.rms for e in own), ulp * size)
    vanishes = rms > 0.3 * size  # no digit right
    factor = GRADIENT_FACTOR if name.startswith("grad ") else FACTOR
    if vanishes:
        factor = VANISHING_FACTOR
    if dtype is torch.float64:
        factor *= 2  # the truth is no more exact than the result: both err
    reference_error = max(e.largest for e in own)
    least = ulp * largest * (factor if dtype.itemsize >= 4 else 1)
    ratio = divide(error.largest, max(reference_error, least))
    # A systematic error does not average out over the channels as rounding does: allow two standard
    # errors of what the bound on the rms error allows.
    drift = 2 * factor * rms / math.sqrt(channels)
    norm = factor * max(abs(e.norm) for e in own) + drift
    mean = factor * max(abs(e.mean) for e in own) + drift

    flat, flat_truth = got.detach().to(truth.device, torch.float64).flatten(), truth.flatten()
    cosine = divide((flat @ flat_truth).item(), (flat.norm() * flat_truth.norm()).item(), 1.0)
    relative_norm = divide(flat.norm().item(), flat_truth.norm().item(), 1.0)
    bias = divide(error.mean, size)

    failures = []
    if not ratio <= factor:  # written so that NaN fails
        failures.append(f"{name}: max error {error.largest:.3g} is {ratio:.3g}x PyTorch's own")
    if not error.rms <= factor * rms:
        failures.append(f"{name}: rms error {error.rms:.3g}, PyTorch's own {rms:.3g}")
    if not vanishes:
        # An error vector of relative length r turns the result by an angle of at most asin(r).
        turn = min(1.0, factor * divide(rms, size))
        if not cosine >= math.sqrt(1 - turn * turn) - 1e-12:
            failures.append(f"{name}: cosine {cosine:.9f} to the truth")
        if not abs(error.norm) <= norm:
            failures.append(f"{name}: norm {relative_norm:.9f} of the truth's")
        if not abs(error.mean) <= mean:
            failures.append(f"{name}: bias {bias:.3g}")
    figures = (error.largest, reference_error, ratio, cosine, relative_norm, bias)
    return Judged(name, *figures, tuple(failures), ratio / factor)


def divide(a: float, b: float, nothing: float = 0.0) -> float:
    """a / b; 0 / 0 is `nothing`, anything else over 0 infinite."""
    if b == 0:
        return nothing if a == 0 else math.inf
    return a / b


class AgainstTruth(NamedTuple):
    """Absolute errors of a result and of plain PyTorch's, both against the same float64 truth."""

    scale: float  #: largest absolute value of the truth
    largest: float
    mean: float
    own_largest: float  #: plain PyTorch's
    own_mean: float

    def bound(self, factor: float, floor: float) -> float:
        """`factor` times PyTorch's own largest error, and at least `floor` times the scale."""
        return max(floor * self.scale, factor * self.own_largest)

    def mean_bound(self, factor: float, floor: float) -> float:
        """The same for the mean error."""
        return max(floor * self.scale, factor * self.own_mean)


def against_truth(got: Tensor, own: Tensor, truth: Tensor) -> AgainstTruth:
    """Compare a result with what plain PyTorch computes, `own`, by the float64 `truth`.

    For whole models, where only sizes of errors are compared; `check` looks closer.

    Args:
        got: the result, any floating dtype.
        own: of plain PyTorch in that dtype.
        truth: of plain PyTorch in float64. All three have one shape.
    """
    error, own_error = ((t.double() - truth).abs() for t in (got, own))
    return AgainstTruth(
        truth.abs().max().item(),
        error.max().item(),
        error.mean().item(),
        own_error.max().item(),
        own_error.mean().item(),
    )
