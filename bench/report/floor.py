"""The tables of docs/how_it_works.md: maps that GPU kernels ask for, and what a mixer keeps.

From bench/results/cuda_kernels.json, the generated docs/triton_traffic.md and what `load.load_kept`
gives. Needs nothing but Python.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from bench.report.documents import Document, ReportError

FLOOR_MARKS = "<!-- floor:begin -->", "<!-- floor:end -->"
KEPT_MARKS = "<!-- kept:begin -->", "<!-- kept:end -->"
TARGET, DTYPE, BATCH = "sm_90a", "bf16", 256  # an H100: what triton_traffic.md is cut for, too
FLOAT = 4  # bytes of what saved_bytes.json counts
# Columns of triton_traffic.md that are over the 4 units of the forward.
OVER_FOUR = ("gates", "combine")


class Pass(NamedTuple):
    """Kernels that run one behind the other, and the maps that they cannot do without."""

    title: str
    least: int
    cuda: tuple[str, ...]
    triton: tuple[str, ...]  # columns of triton_traffic.md


PASSES = (
    Pass("inference, one launch", 4, ("single_pass",), ()),
    Pass("inference, two launches", 6, ("gates", "combine"), ("gates", "channel gates", "combine")),
    Pass("batch statistics, before either", 2, ("statistics",), ("statistics", "merge statistics")),
    Pass(
        "backward, three passes",
        13,
        ("backward_combine", "backward_gate", "backward_depthwise"),
        ("backward",),
    ),
)


def floor_table(cuda: Document, traffic: str) -> list[str]:
    """Units of maps, stages of rcvit_xs across.

    Args:
        cuda: bench/results/cuda_kernels.json.
        traffic: docs/triton_traffic.md.

    Raises:
        ReportError: either lacks a number.
    """
    stages = _traffic(traffic)
    rows = {
        (row["channels"], row["kernel"]): row
        for row in cuda["rows"]
        if (row["target"], row["dtype"]) == (TARGET, DTYPE)
    }
    lines = [
        f"| | least | {' | '.join(stages)} |",
        "|---|---:|" + "---:|" * len(stages),
    ]
    for of in PASSES:
        found = [_cuda(rows, int(stage.split(",")[0]), of.cuda) for stage in stages]
        lines.append(f"| {of.title}, `cuda` | {of.least} | {' | '.join(found)} |")
        if of.triton:
            numbers = (_triton(columns, of.triton) for columns in stages.values())
            cells = " | ".join(f"({n:.1f})" for n in numbers)
            lines.append(f"| {of.title.partition(',')[0]}, `triton` | {of.least} | {cells} |")
    return [
        *lines,
        "",
        f"Batch {BATCH}, bfloat16, cut for an H100. Maps alone, and in brackets with weights, gates and",
        "sums, which caches serve nearly all; Triton's are counted together only, by tile and not by",
        "thread, so compare brackets of a kind. Bold: the forward that the planner takes. Counted, not",
        "timed, in [cuda_kernels.md](cuda_kernels.md) and [triton_traffic.md](triton_traffic.md).",
    ]


def kept_table(kept: Document) -> list[str]:
    """What autograd keeps, in units of the input; mixers down."""
    lines = ["| mixer, float32 | plain PyTorch | fused |", "|---|---:|---:|"]
    for row in kept["rows"]:
        unit = FLOAT * math.prod(row["shape"])
        title = f"{row['model']} stage {row['stage']}, ({', '.join(map(str, row['shape']))})"
        eager, fused = row["eager_bytes"] / unit, row["fused_bytes"] / unit
        lines.append(f"| {title} | {eager:.2f} | {fused:.2f} |")
    return [
        *lines,
        "",
        "From `bench/results/saved_bytes.json`; the input counts, parameters do not.",
    ]


def load_floor(root: Path) -> list[str]:
    """`floor_table` of a checkout.

    Raises:
        ReportError: a file is not there, or lacks a number.
    """
    static = root / "bench" / "results" / "cuda_kernels.json"
    traffic = root / "docs" / "triton_traffic.md"
    for path in (static, traffic):
        if not path.is_file():
            raise ReportError(f"docs/how_it_works.md: expected a file at {path}")
    try:
        document = json.loads(static.read_text(encoding="utf-8"))
        return floor_table(document, traffic.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"docs/how_it_works.md: expected more of {static.name} or {traffic.name}: {error!r}"
        ) from None


def _traffic(text: str) -> dict[str, dict[str, float]]:
    """Numbers of the stages of rcvit_xs, by "C, H x W" and column."""
    _, found, rest = text.partition(f"## Batch {BATCH},")
    lines = rest.partition("\n## ")[0].splitlines()
    table = [[c.strip(" *") for c in x.strip("|").split("|")] for x in lines if x[:1] == "|"]
    stages = {
        row[1]: dict(zip(table[0][2:], map(float, row[2:]), strict=True))
        for row in table[2:]
        if row[0].startswith("xs ")
    }
    if not found or not stages:
        raise ReportError(
            f"docs/triton_traffic.md: expected a table of batch {BATCH} with the stages of xs"
        )
    return stages


def _triton(columns: dict[str, float], names: tuple[str, ...]) -> float:
    return sum(columns[name] * (4 if name in OVER_FOUR else 1) for name in names)


def _cuda(rows: dict[tuple[int, str], Document], channels: int, kernels: tuple[str, ...]) -> str:
    if kernels == PASSES[0].cuda and (channels, kernels[0]) not in rows:
        return "does not fit"
    found = [rows[channels, kernel] for kernel in kernels]
    maps = sum(row["maps"] for row in found)
    text = f"{maps:.2f} ({maps + sum(row['rest'] for row in found):.1f})"
    forward = kernels in (PASSES[0].cuda, PASSES[1].cuda)
    return f"**{text}**" if forward and all(row["chosen"] for row in found) else text
