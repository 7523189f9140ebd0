"""`casvit-kernels parity`: a backend of this machine against PyTorch in float64."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from .. import benchmark, testing
from ..backends import backends, check_name
from ..demo import phrases
from ..demo.progress import phase
from ..demo.terminal import paragraph, table
from ..testing import FACTOR, Row
from .arguments import Outcome, add_seed, add_verb, default_backend, refusing

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add(verbs: Any) -> None:
    """The parser of this verb."""
    verb = add_verb(
        verbs,
        "parity",
        run,
        "check a backend on this machine against PyTorch in float64",
        "Runs the checks of the test suite: layouts, modes, dtypes, odd sizes, gradients, and a "
        "random sweep. A backend passes where its error is at most twice PyTorch's own.",
        "casvit-kernels parity --backend cpu --dtype float32 --dtype bfloat16",
    )
    verb.add_argument(
        "--backend", metavar="NAME", help="which one (default: the automatic choice on the CPU)"
    )
    verb.add_argument("--long", action="store_true", help="400 random cases instead of 12")
    verb.add_argument(
        "--dtype", choices=DTYPES, action="append", metavar="DTYPE",
        help=f"only this one of {', '.join(DTYPES)}; may be repeated (default: all)",
    )  # fmt: skip
    add_seed(verb)


def run(arguments: argparse.Namespace) -> Outcome:
    with refusing():
        check_name(arguments.backend, "--backend")
        backend = arguments.backend or default_backend()
        reason = next(status.reason for status in backends() if status.name == backend)
        if reason is not None:
            raise ValueError(f"--backend: {backend!r} cannot run here: {reason}")
        dtypes = [getattr(torch, name) for name in arguments.dtype] if arguments.dtype else None
        testing.cases(backend, dtypes=dtypes)
    with phase("parity") as bar:
        rows = testing.run(
            backend, dtypes=dtypes, long=arguments.long, seed=arguments.seed, progress=bar.reach
        )
    passed = all(row.passed for row in rows)
    document = {
        "command": "parity",
        "environment": benchmark.environment(),
        "backend": backend,
        "passed": passed,
        "rows": [{**row._asdict(), "passed": row.passed} for row in rows],
    }
    return Outcome(document, _text(backend, rows), passed)


def _text(backend: str, rows: Sequence[Row]) -> str:
    """One line for each dtype and mode, then every failure."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dtype, row.mode), []).append(row)
    lines = []
    for (dtype, mode), group in groups.items():
        worst = max(group, key=lambda row: (not row.passed, row.ratio))
        lines.append(
            [
                dtype,
                mode,
                f"{len(group)}",
                f"{sum(not row.passed for row in group)}",
                f"{worst.ratio:.2f}",
                phrases.error(worst.max_error),
                phrases.shape(worst.shape),
                worst.layout,
                worst.tensor,
            ]
        )
    head = (
        "dtype",
        "mode",
        "cases",
        "failed",
        "worst ratio",
        "its error",
        "shape",
        "layout",
        "tensor",
    )
    failed = [row for row in rows if not row.passed]
    parts = [table(head, lines, left=2)]
    parts += [
        f"FAILED {row.dtype} {row.layout} {row.mode} {phrases.shape(row.shape)}: "
        + "; ".join(row.failures)
        for row in failed
    ]
    verdict = f"{len(failed)} FAILED" if failed else "all passed"
    parts.append(
        paragraph(
            f"Backend {backend}: {len(rows)} cases, {verdict}. The ratio is the largest error over "
            f"that of plain PyTorch, both against float64; at most {FACTOR:g} passes."
        )
    )
    return "\n\n".join(parts)
