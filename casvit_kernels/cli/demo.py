"""`casvit-kernels demo`: proof on photographs, speed, training and a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import demo
from ..demo import terminal
from .arguments import Outcome, add_images, add_model, add_seed, add_threads, add_verb, refusing


def add(verbs: Any) -> None:
    """The parser of this verb."""
    verb = add_verb(
        verbs,
        "demo",
        run,
        "fuse a CAS-ViT, prove on photographs that it is the same, time it, write a report",
        "Takes photographs that ship with scikit-learn and scikit-image, compares the fused "
        "network with PyTorch layer by layer, measures both beside torch.compile and ONNX Runtime, "
        "trains a small CAS-ViT on handwritten digits with and without fusion, and writes one HTML "
        "file with the results. Takes some minutes; needs casvit-kernels[demo].",
        "casvit-kernels demo --images ~/Pictures --checkpoint rcvit_xs.pth",
    )
    add_model(verb)
    add_images(verb)
    verb.add_argument(
        "--output", type=Path, metavar="PATH", default=Path("casvit_report.html"),
        help="the report, replaced if it exists (default: %(default)s)",
    )  # fmt: skip
    add_threads(verb)
    verb.add_argument(
        "--quick", action="store_true",
        help="seconds instead of minutes: few rounds and steps, no torch.compile, no ONNX Runtime",
    )  # fmt: skip
    verb.add_argument("--no-train", action="store_true", help="leave the training out")
    add_seed(verb)


def run(arguments: argparse.Namespace) -> Outcome:
    with refusing():
        job = demo.Demo(
            demo.Options(
                model=arguments.model,
                checkpoint=arguments.checkpoint,
                images=arguments.images,
                output=arguments.output,
                threads=arguments.threads,
                quick=arguments.quick,
                train=not arguments.no_train,
                seed=arguments.seed,
            )
        )
    results = job.run()
    return Outcome(results.as_json(), terminal.demo(results), results.parity.passed)
