"""Whether the fused model computes what the reference computes, judged against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import benchmark
from ..testing import FACTOR, against_truth
from ..testing.numerics import divide
from . import network as networks


@dataclass(frozen=True)
class Deviation:
    """One output, compared. Errors are the largest absolute differences to float64."""

    name: str
    shape: tuple[int, ...]
    largest_output: float
    reference_error: float
    fused_error: float
    ratio: float  # of the errors; PyTorch's is taken as at least one ulp of the largest output
    passed: bool


@dataclass(frozen=True)
class Parity:
    """Every mixer on its real input, then the logits."""

    layers: list[Deviation]
    logits: Deviation
    same_top1: (
        int  # images with the reference's top-1 class; only a near-tie can differ if logits passed
    )
    images: int
    passed: bool
    network: Deviation | None = None  # the logits by `fuse_network`; None: there are no kernels

    @property
    def outputs(self) -> list[Deviation]:
        """All that were compared."""
        return [*self.layers, self.logits, *([self.network] if self.network else [])]

    @property
    def worst(self) -> Deviation:
        """The mixer with the largest ratio."""
        return max(self.layers, key=lambda layer: layer.ratio)


def deviation(name: str, truth: Tensor, reference: Tensor, fused: Tensor) -> Deviation:
    """Judge `fused` by `truth` (float64) and by the error that `reference` makes itself."""
    found = against_truth(fused, reference, truth)
    ratio = divide(found.largest, found.bound(1.0, torch.finfo(fused.dtype).eps))
    return Deviation(
        name=name,
        shape=tuple(truth.shape),
        largest_output=found.scale,
        reference_error=found.own_largest,
        fused_error=found.largest,
        ratio=ratio,
        passed=ratio <= FACTOR,  # NaN fails
    )


@torch.no_grad()
def check(
    reference: nn.Module,
    fused: nn.Module,
    x: Tensor,
    inputs: dict[str, Tensor],
    advance: Callable[[], object],
) -> Parity:
    """Compare two models of equal weights.

    Args:
        reference, fused: in eval mode.
        x: ``(B, 3, H, W)``.
        inputs: what each mixer of `reference` receives for `x`, by name.
        advance: called after each comparison.
    """
    fused_mixers = networks.mixers(fused)
    layers = []
    for name, mixer in networks.mixers(reference).items():
        z = inputs[name]
        truth = copy.deepcopy(mixer).double()(z.double())
        layers.append(deviation(name, truth, mixer(z), fused_mixers[name](z)))
        advance()
    truth = copy.deepcopy(reference).double()(x.double())
    plain, output = reference(x), fused(x)
    logits = deviation("logits", truth, plain, output)
    same = int((output.argmax(1) == plain.argmax(1)).sum())
    advance()
    network = _network(reference, x, truth, plain)
    passed = all(d.passed for d in (*layers, logits)) and (network is None or network.passed)
    return Parity(layers, logits, same, len(x), passed, network)


def _network(reference: nn.Module, x: Tensor, truth: Tensor, plain: Tensor) -> Deviation | None:
    try:
        whole = benchmark.network_of(copy.deepcopy(reference))
    except benchmark.Unavailable:
        return None
    return deviation("logits, fuse_network", truth, plain, whole(x))
