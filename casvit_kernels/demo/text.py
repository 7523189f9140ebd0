"""What the verbs print for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..testing import FACTOR, Row
from . import words
from .bench import Bench
from .check import Parity
from .results import Results
from .speed import Speed
from .table import table
from .training import Training

WIDTH = 100  # characters of a line of prose


def demo(results: Results) -> str:
    """The demo's tables, its findings last: they are what stays on the screen."""
    parts = [_deviations(results.parity)]
    if results.speed is not None:
        parts.append(_speed(results.speed))
    if results.training is not None:
        parts.append(_training(results.training))
    parts += [_paragraph(f"Note: {note}") for note in words.notes(results)]
    if results.parity.passed:
        parts.append(_paragraph(words.summary(results)))
        parts.append(f"Report: {results.report}")
    else:
        parts.append("Parity FAILED: nothing was timed, no report was written.")
    return "\n\n".join(parts)


def bench(found: Bench) -> str:
    if found.speed is None:
        return f"{_deviations(found.parity)}\n\nParity FAILED: nothing was timed."
    worst = found.parity.worst
    return (
        f"{_speed(found.speed)}\n\nParity: passed; no mixer's error is more than {worst.ratio:.2f} "
        f"times PyTorch's own ({worst.name})."
    )


def parity(backend: str, rows: Sequence[Row]) -> str:
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
                words.error(worst.max_error),
                words.shape(worst.shape),
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
        f"FAILED {row.dtype} {row.layout} {row.mode} {words.shape(row.shape)}: "
        + "; ".join(row.failures)
        for row in failed
    ]
    verdict = f"{len(failed)} FAILED" if failed else "all passed"
    parts.append(
        _paragraph(
            f"Backend {backend}: {len(rows)} cases, {verdict}. The ratio is the largest error over "
            f"that of plain PyTorch, both against float64; at most {FACTOR:g} passes."
        )
    )
    return "\n\n".join(parts)


def info(document: dict[str, Any]) -> str:
    facts = [[n, v] for n, v in words.facts(document["environment"])]
    facts.append(["CPU features", " ".join(document["cpu_features"]) or "unknown"])
    sets = document["instruction_sets"]
    backends = [
        [b["name"], "usable" if b["usable"] else f"not usable: {b['reason']}"]
        for b in document["backends"]
    ]
    parts = [_pairs(facts)]
    if sets:
        parts.append("Instruction sets of the native library\n" + _pairs(_usable(sets)))
    parts.append("Backends, in order of preference\n" + _pairs(backends))
    return "\n\n".join(parts)


def _usable(sets: dict[str, str | None]) -> Iterator[list[str]]:
    for name, reason in sets.items():
        yield [name, "usable" if reason is None else f"not usable: {reason}"]


def _pairs(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"  {row[0]:<{width}}  {row[1]}" for row in rows)


def _deviations(parity: Parity) -> str:
    rows = [
        [d.name, words.shape(d.shape), *words.errors(d)] for d in (*parity.layers, parity.logits)
    ]
    head = ("Parity with float64", "output", *words.ERRORS_HEAD)
    return f"{table(head, rows)}\n{words.parity_sentence(parity)}"


def _speed(speed: Speed) -> str:
    """One line for each implementation, one column for each thing that was timed."""
    columns = [("whole model", speed.model, True)] if speed.model else []
    columns += [(f"{s.name} mixer", s.latencies, not speed.model) for s in speed.stages]
    columns += [("all mixers", speed.mixers, True)] if speed.mixers else []
    head = ["Median time"]
    rows = {x.name: [x.name] for _, latencies, _ in columns for x in latencies}
    for title, latencies, compared in columns:
        head += [title, "to eager"] if compared else [title]
        found = {latency.name: latency for latency in latencies}
        for name, row in rows.items():
            cells = ["", ""]
            if name in found:
                latency = found[name]
                cells = [words.milliseconds(latency.seconds), words.times(latency.speedup)]
            row += cells if compared else cells[:1]
    parts = [table(head, list(rows.values()))]
    parts += [_paragraph(line) for line in words.absent(speed)]
    parts.append(_paragraph(words.speed_sentence(speed)))
    return "\n".join(parts)


def _training(training: Training) -> str:
    rows = table(("Training", *words.TRAINING_HEAD), words.training_rows(training))
    return f"{rows}\n{_paragraph(words.training_sentence(training))}"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH)
