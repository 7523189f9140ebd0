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
from ..demo import check, network, phrases, speed, whole
from ..demo.progress import Phase, phase
from ..demo.speed import Speed
from ..demo.terminal import deviations, latencies, paragraph, table
from ..demo.whole import WholeNetwork
from ..surgery import fuse
from .arguments import (
    Outcome,
    Refused,
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


@dataclass(frozen=True)
class NetworkBench:
    """The whole network, by precision."""

    model: str
    environment: dict[str, Any]
    networks: list[WholeNetwork]


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
    verb.add_argument(
        "--network", action="store_true",
        help="only the whole model, by fuse_network in each precision that this CPU has, beside ONNX "
        "Runtime, OpenVINO and torch.compile, each in a process of its own; takes minutes",
    )  # fmt: skip
    add_threads(verb)
    verb.add_argument(
        "--quick",
        action="store_true",
        help="few rounds, no torch.compile, no ONNX Runtime, no OpenVINO",
    )
    add_seed(verb)


def run(arguments: argparse.Namespace) -> Outcome:
    with refusing():
        default_backend()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.network:
        if arguments.stage is not None:
            raise Refused("--stage: expected none with --network, which times the whole model")
        return _network(arguments.model, arguments.batch, arguments.quick, arguments.seed)
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


def _network(name: str, batch: int, quick: bool, seed: int) -> Outcome:
    precisions = benchmark.precisions() or ["fp32"]
    with refusing():
        model, x = whole.problem(name, batch, seed)
    networks = []
    rounds, starts = (speed.QUICK_ROUNDS, 1) if quick else (speed.ROUNDS, 3)
    for precision in precisions:
        names = benchmark.names_for(precision, quick)
        with phase(f"whole model, {precision}", starts * len(names) + rounds) as bar:

            def say(what: str, bar: Phase = bar) -> None:
                bar.say(what)
                bar.advance()

            found = whole.measure(
                model,
                x,
                batch=batch,
                precision=precision,
                names=names,
                rounds=rounds,
                starts=starts,
                progress=say,
            )
        networks.append(whole.summary(found))
    document = NetworkBench(name, benchmark.environment(), networks)
    text = "\n\n".join(_network_text(name, n) for n in networks)
    passed = all(n.refused is None for n in networks)
    return Outcome({"command": "bench", **dataclasses.asdict(document)}, text, passed)


def _network_text(name: str, found: WholeNetwork) -> str:
    if found.refused is not None:
        return f"{name}, {found.precision}: {found.refused}."
    images = "1 image" if found.batch == 1 else f"{found.batch} images at once"
    head = (
        f"{name}, {found.precision}, {images}",
        "median",
        "to best rival",
        "largest error",
        f"same top-1 of {found.images}",
        "share of peak",
    )
    rows = [
        [
            row.name + (f" ({row.facts['precision']})" if "precision" in row.facts else ""),
            phrases.milliseconds(row.seconds),
            "" if row.to_best_rival is None else phrases.times(row.to_best_rival),
            phrases.error(row.max_error),
            str(row.same_top1),
            "" if row.share_of_peak is None else f"{row.share_of_peak:.2f}",
        ]
        for row in found.rows
    ]
    parts = [table(head, rows)]
    parts += [paragraph(f"Not measured: {a.name} ({a.reason}).") for a in found.absent]
    peak = found.peak_macs_per_second
    parts.append(
        paragraph(
            "Errors: largest difference to PyTorch in float64. Best rival: of what is not this "
            f"library's. An image takes {found.macs / 1e9:.3f} GMAC; "
            + (
                "the CPU's peak is not known here."
                if peak is None
                else f"the CPU's measured peak is {peak / 1e9:.0f} GMAC/s."
            )
        )
    )
    return "\n".join(parts)


def _text(found: Bench) -> str:
    if found.speed is None:
        return f"{deviations(found.parity)}\n\nParity FAILED: nothing was timed."
    worst = found.parity.worst
    return (
        f"{latencies(found.speed)}\n\nParity: passed; no mixer's error is more than {worst.ratio:.2f} "
        f"times PyTorch's own ({worst.name})."
    )
