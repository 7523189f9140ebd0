"""Outputs and gradients of the candidates against float64, before anything is timed."""

from __future__ import annotations

import copy
import math
import operator
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.case import Case
from bench.harness.results import GradientError, Measured
from casvit_kernels import benchmark
from casvit_kernels.testing import FACTOR, GRADIENT_FACTOR

# A ReLU input within rounding of 0 may fall on either side of it, in PyTorch's arithmetic or in ours:
# among millions some do. One changes the gradients of its channel, by up to 1e-3 of a norm in a test.
KINKS = 1e-2
VANISHING = 1e-9
CHUNK = 32  # images of float64 at a time


def truth(case: Case, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The output in float64; for a training step the gradients too."""
    if case.dtype == "bfloat16" and "model" not in case.level:
        x = x.to(torch.bfloat16)  # what the candidates get
    module, x = copy.deepcopy(module).double(), x.double()
    if "training" not in case.level:
        with torch.no_grad():
            return (torch.cat([module.eval()(images) for images in x.split(CHUNK)]),)
    x.requires_grad_(case.level == "training")
    out = module.train()(x)
    if case.level == "training-forward":
        return (out.detach(),)
    grad = benchmark.output_gradient(out.detach().to(getattr(torch, case.dtype))).double()
    out, *grads = benchmark.training_step(module, x, out, grad)
    return (out.detach(), *grads)


def errors(case: Case, got: Any, truth: tuple[Tensor, ...]) -> tuple[float, GradientError | None]:
    """The largest error of the output, in a training step over its largest value; and of gradients.

    A mixer's gradients are judged by their 90th percentile and their norm: the largest error is often
    at a ReLU's kink (see `KINKS`), and the parity suite judges every element. A whole model's
    gradients are judged by the norm of all of them together.
    """
    if not isinstance(got, tuple):
        got = (got if isinstance(got, Tensor) else torch.from_numpy(got),)
    if any(g.shape != t.shape for g, t in zip(got, truth, strict=True)):
        return math.inf, None if len(truth) == 1 else GradientError(math.inf, math.inf)
    largest = truth[0].abs().max().item()
    error = (got[0].double() - truth[0]).abs().max().item()
    if len(truth) == 1:
        return error, None
    typical, norms = [0.0], [(0.0, 1.0)]
    for g, t in zip(got[1:], truth[1:], strict=True):
        wrong, size = g.double() - t, t.abs().max().item()
        # A gradient that vanishes identically (of a bias before batch statistics) has no digits.
        if size > VANISHING * largest or wrong.isnan().any():
            rank = math.ceil(0.9 * wrong.numel())
            typical.append(wrong.abs().flatten().kthvalue(rank).values.item() / size)
            norms.append((wrong.norm().item(), t.norm().item()))
    found = [wrong / size for wrong, size in norms]
    if case.level == "model-training":
        typical = [0.0]
        found = [math.hypot(*(w for w, _ in norms[1:])) / math.hypot(*(s for _, s in norms[1:]))]
    if any(map(math.isnan, found)):
        return error / largest, GradientError(math.nan, math.nan)
    return error / largest, GradientError(max(typical), max(found))


def refusal(case: Case, measured: Measured, eager: str, truth: tuple[Tensor, ...]) -> str | None:
    """Where a fused candidate is further from `truth` than `FACTOR` times eager is.

    Eager in the same layout, where that was called: around the mixers a model is PyTorch's own, whose
    channels-last convolutions are less exact. In a training step it is `GRADIENT_FACTOR` times, as in
    the parity suite, and a mixer's gradients may be off by `KINKS`.
    """
    errors = measured.errors
    if eager not in errors:
        return f"nothing to compare with, {eager}: {measured.absent[eager]}"
    factor = FACTOR if len(truth) == 1 else GRADIENT_FACTOR
    # Not less than one ulp: PyTorch may have been exact by luck.
    scale = truth[0].abs().max().item() if len(truth) == 1 else 1.0
    ulp = torch.finfo(getattr(torch, case.dtype)).eps * scale
    failed = []
    for name, error in errors.items():
        if name.startswith("fused"):
            alike = f"{eager} channels_last" if name.endswith(" channels_last") else eager
            own = max(errors.get(alike, errors[eager]), ulp)
            if not error <= factor * own:  # NaN fails
                failed.append(f"{name}: max error {error:.3g}, PyTorch's own {own:.3g}")
    if eager in measured.gradient_errors:
        eps = torch.finfo(getattr(torch, case.dtype)).eps
        own_gradients = GradientError(*(max(e, eps) for e in measured.gradient_errors[eager]))
        allowed = [GRADIENT_FACTOR * e for e in own_gradients]
        if case.level == "training":
            allowed[1] = max(allowed[1], KINKS)
        failed += [
            f"{name}: error of gradients {found}, PyTorch's own {own_gradients}"
            for name, found in measured.gradient_errors.items()
            if name.startswith("fused") and not all(map(operator.le, found, allowed))
        ]
    return f"parity failed, nothing was timed: {'; '.join(failed)}" if failed else None
