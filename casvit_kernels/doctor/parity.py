"""Whether each backend that is usable here computes what PyTorch computes: a spread of cases.

`casvit-kernels parity` runs all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch

from .. import benchmark, testing
from ..backends import backends, use_backend
from ..demo import check, network
from ..models.rcvit import CONFIGS
from ..testing import Case, Row
from .finding import Finding
from .variables import BACKEND

SMALL, LARGE = 64, 224  # sides of the images whose mixers are checked
IMAGES, SIDE = 4, 64  # that a whole network is checked with
_INTERPRETED = 2  # cases of Triton's interpreter, which takes seconds for each


def plan() -> dict[str, list[Case]]:
    """What is checked of each backend that is usable here."""
    return {
        status.name: _cases(status.name)
        for status in backends()
        if status.usable and status.name in testing.BACKENDS
    }


def precisions() -> list[str]:
    """Those in which a whole network is checked here."""
    return benchmark.precisions()


def findings(planned: dict[str, list[Case]], advance: Callable[[], object]) -> Iterator[Finding]:
    """One for each backend, and one for each precision of whole networks.

    Args:
        planned: by backend, as `plan` gives them.
        advance: called after each case, and each precision.
    """
    for backend, cases in planned.items():
        rows = []
        for case in cases:
            rows.append(testing.verdict(case))
            advance()
        yield _judged(backend, rows)
    for precision in precisions():
        yield _network(precision)
        advance()


def _cases(backend: str) -> list[Case]:
    """Each dtype, layout and mode, small; each mixer of the family, small; those of rcvit_xs, large."""
    if backend == "triton" and testing.BACKENDS[backend].device == "cpu":
        return testing.cover(testing.cases(backend), 1)[:_INTERPRETED]
    odd = [case for case in testing.cases(backend) if case.shape == (3, 3, 13, 9)]
    if backend == "reference":  # plain PyTorch itself, which the others are held against
        return testing.cover(odd, 1)
    small = testing.real_cases(backend, 2, inputs=[SMALL])
    large = [
        case
        for case in testing.real_cases(backend, 2, inputs=[LARGE])
        if case.mode == "eval" and case.shape[1] in CONFIGS["rcvit_xs"].dims
    ]
    return testing.cover(odd, 1) + _one_each(small) + _one_each(large)


def _one_each(cases: list[Case]) -> list[Case]:
    """One case of each shape, of another dtype, layout and mode from shape to shape."""
    alike = sum(case.shape == cases[0].shape for case in cases)
    return cases[:: alike + 1]


def _judged(backend: str, rows: list[Row]) -> Finding:
    name = f"parity of {backend}"
    failed = [row for row in rows if not row.passed]
    if not failed:
        worst = max((row.ratio for row in rows if row.ratio == row.ratio), default=0.0)
        return Finding(
            name, "ok", f"{len(rows)} cases, errors at most {worst:.2f} times PyTorch's own"
        )
    first = failed[0]
    shape = "x".join(map(str, first.shape))
    instead = "" if backend == "reference" else f"; until then export {BACKEND}=reference"
    return Finding(
        name,
        "problem",
        f"{len(failed)} of {len(rows)} cases failed, the first {first.dtype} {first.layout} "
        f"{first.mode} {shape}: {'; '.join(first.failures)}",
        f"report what 'python -m casvit_kernels parity --backend {backend}' says{instead}",
    )


@torch.no_grad()
def _network(precision: str) -> Finding:
    name, half = f"parity of fuse_network, {precision}", precision == "bf16"
    with torch.random.fork_rng(devices=[]), use_backend("cpu"):
        model = network.build("rcvit_xs", None, 0)
        x = torch.randn(IMAGES, 3, SIDE, SIDE)
        network.calibrate(model, x)
        truth = copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            plain = model(x).float()
        got = benchmark.network_of(model, half)(x)
    found = check.deviation("logits", truth, plain, got)
    ratio = f"logits of {IMAGES} images, an error of {found.ratio:.2f} times PyTorch's own"
    if found.passed:
        return Finding(name, "ok", ratio)
    remedy = "report this; until then use fuse, which leaves the network to PyTorch"
    return Finding(name, "problem", f"{ratio}; at most {testing.FACTOR:g} passes", remedy)
