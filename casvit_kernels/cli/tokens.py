"""`casvit-kernels tokens`: token clustering of a ViT over photographs, as a page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..demo import tokens
from ..demo.tokens import page
from .arguments import Outcome, add_images, add_seed, add_threads, add_verb, positive, refusing


def add(verbs: Any) -> None:
    """The parser of this verb."""
    verb = add_verb(
        verbs,
        "tokens",
        run,
        "expedite a ViT by token clustering, draw its clusters and feature maps over photographs",
        "Builds a ViT of timm, runs its later blocks on cluster centres, and writes one HTML file: for "
        "each photograph the borders of its clusters and the feature map without and with clustering, "
        "and how many tokens, multiply-accumulates and images a second that is. Nothing is downloaded. "
        "Needs casvit-kernels[timm], and casvit-kernels[demo] for the photographs.",
        "casvit-kernels tokens --images ~/Pictures --model vit_base_patch16_224 --size 448",
    )
    defaults = tokens.Options()
    verb.add_argument(
        "--model", default=defaults.model, metavar="NAME",
        help="a plain ViT of timm (default: %(default)s)",
    )  # fmt: skip
    verb.add_argument(
        "--checkpoint", type=Path, metavar="PATH",
        help="trained weights of it (default: random ones)",
    )  # fmt: skip
    add_images(verb)
    verb.add_argument(
        "--size", type=positive, metavar="PIXELS",
        help="height and width of the model's input (default: what it was made for)",
    )  # fmt: skip
    verb.add_argument(
        "--at", type=positive, metavar="N",
        help="blocks before the clustering (default: 10 of 24, as published)",
    )  # fmt: skip
    verb.add_argument(
        "--until", type=positive, metavar="N",
        help="blocks before the reconstruction (default: all)",
    )  # fmt: skip
    verb.add_argument(
        "--grid", type=grid, metavar="HxW",
        help="cluster centres (default: 28 for 40 tokens each way, as published)",
    )  # fmt: skip
    verb.add_argument(
        "--output", type=Path, metavar="PATH", default=defaults.output,
        help="the page, replaced if it exists (default: %(default)s)",
    )  # fmt: skip
    add_threads(verb)
    add_seed(verb)


def run(arguments: argparse.Namespace) -> Outcome:
    with refusing():
        job = tokens.TokensDemo(
            tokens.Options(
                model=arguments.model,
                checkpoint=arguments.checkpoint,
                images=arguments.images,
                output=arguments.output,
                at=arguments.at,
                until=arguments.until,
                grid=arguments.grid,
                size=arguments.size,
                threads=arguments.threads,
                seed=arguments.seed,
            )
        )
    results = job.run()
    return Outcome(results.as_json(), page.text(results))


def grid(value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", value)
    pair = (0, 0) if found is None else (int(found[1]), int(found[2]))
    if min(pair) < 1:
        raise argparse.ArgumentTypeError(f"expected HxW, as 28x28, got {value!r}")
    return pair
