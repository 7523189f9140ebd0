"""`casvit-kernels bench`: times the mixers and the whole model, on random images."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import benchmark
from ..demo import check, network, speed
from ..demo.progress import phase
from ..demo.speed import Speed
from ..demo.terminal import deviations, latencies
from ..surgery import fuse
from .arguments import (
    Outcome,
    add_model,
    add_seed,
    add_threads,
    add_verb,
    default_backend,
    positive,
    refusing,
)

SIZE = 224  # pixels


@dataclass(frozen=True)
class Bench:
    """Speed is None where parity failed: nothing was timed."""

    model: str
    environment: dict[str, Any]
    parity: check.Parity
    speed: Speed | None


def add(verbs: Any) -> None:
    """The parser of this verb."""
    verb = add_verb(
        verbs,
        "bench",
        run,
        "time the mixers and the whole model against PyTorch, torch.compile and ONNX Runtime",
        "Checks parity first and times nothing where it fails. All implementations take turns in "
        "every round; the table shows medians, and how many times as fast as eager PyTorch.",
        "casvit-kernels bench --model rcvit_t --batch 1 --stage 1 --stage 2",
    )
    add_model(verb, checkpoint=False)
    verb.add_argument(
        "--batch",
        type=positive,
        default=8,
        metavar="N",
        help="images at once (default: %(default)s)",
    )
    verb.add_argument(
        "--stage", type=int, choices=(1, 2, 3, 4), action="append",
        help="only the mixer of this stage; may be repeated (default: all, and the whole model)",
    )  # fmt: skip
    add_threads(verb)
    verb.add_argument(
        "--quick", action="store_true", help="few rounds, no torch.compile, no ONNX Runtime"
    )
    add_seed(verb)


def run(arguments: argparse.Namespace) -> Outcome:
    with refusing():
        default_backend()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    found = measure(
        arguments.model, arguments.batch, arguments.stage, arguments.quick, arguments.seed
    )
    return Outcome(
        {"command": "bench", **dataclasses.asdict(found)}, _text(found), found.parity.passed
    )


def measure(model: str, batch: int, stages: Sequence[int] | None, quick: bool, seed: int) -> Bench:
    """Check, then measure the mixers of `stages` (1 to 4; None: all, and the whole model)."""
    reference = network.build(model, None, seed)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    network.calibrate(reference, x)
    fused = copy.deepcopy(reference)
    fuse(fused)
    inputs = network.mixer_inputs(reference, x)
    with phase("parity", len(inputs) + 1) as bar:
        parity = check.check(reference, fused, x, inputs, bar.advance)
    measured = None
    if parity.passed:
        measured = speed.measure(reference, x, inputs, quick, stages)
    return Bench(model, benchmark.environment(), parity, measured)


def _text(found: Bench) -> str:
    if found.speed is None:
        return f"{deviations(found.parity)}\n\nParity FAILED: nothing was timed."
    worst = found.parity.worst
    return (
        f"{latencies(found.speed)}\n\nParity: passed; no mixer's error is more than {worst.ratio:.2f} "
        f"times PyTorch's own ({worst.name})."
    )
