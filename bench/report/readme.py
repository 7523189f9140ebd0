"""The tables of README.md: six rows of the best machine that was measured, and whole networks."""

from __future__ import annotations

from typing import NamedTuple

from bench.report import networks
from bench.report.captions import machines, missing
from bench.report.documents import Case, Document, by_set, find
from bench.report.verdict import columns, judge


class Row(NamedTuple):
    """A case of the table, in float32."""

    title: str
    level: str
    model: str
    stage: int | None
    batch: int


# Fixed, whatever the numbers are: the first stage of the smallest model and the last of the largest,
# inference and training; and a whole model at both batch sizes.
ROWS = (
    Row("mixer", "mixer", "xs", 1, 8),
    Row("mixer", "mixer", "t", 4, 8),
    Row("mixer training step", "training", "xs", 1, 8),
    Row("mixer training step", "training", "t", 4, 8),
    Row("whole", "model", "xs", None, 8),
    Row("whole", "model", "xs", None, 1),
)


def readme_table(documents: list[Document]) -> str:
    """The text between the markers of README.md."""
    measured, documents = documents, next(iter(by_set(documents)), [])
    cases = [find(documents, row.level, row.model, row.stage, row.batch) for row in ROWS]
    lines = [
        "| 224x224 input, fp32 | fused, ms | best baseline, ms | speed-up | over eager |",
        "|---|---:|---:|---:|---:|",
        *(_line(row, case) for row, case in zip(ROWS, cases, strict=True)),
        "",
        "Medians of interleaved rounds. Best baseline: of eager, `torch.compile` (contiguous and "
        "channels-last) and, forward only, ONNX Runtime.",
        *(f"{machine}." for machine in machines(documents)),
        *missing([case for case in cases if case is not None]),
        "",
        *networks.readme_lines(measured),
        "Every stage, bfloat16, other CPUs, GPUs, and the command that measures: "
        "[docs/performance.md](docs/performance.md).",
        "",
        "![Speed-up by stage](docs/bench.svg)",
    ]
    return "\n".join(lines)


def _line(row: Row, case: Case | None) -> str:
    if row.stage is None:
        title = f"{row.title} rcvit_{row.model}"
    else:
        title = f"{row.title}, {row.model} stage {row.stage}"
        if case is not None:
            title += f" ({case['channels']}, {case['size']}x{case['size']})"
    return f"| {title}, batch {row.batch} | {' | '.join(columns(judge(case)))} |"
