"""What the demo prints: its tables and findings as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from . import phrases
from .check import Parity
from .results import Results
from .speed import Speed
from .training import Training

WIDTH = 100  # characters of a line of prose


def demo(results: Results) -> str:
    """The demo's tables, its findings last: they are what stays on the screen."""
    parts = [deviations(results.parity)]
    if results.speed is not None:
        parts.append(latencies(results.speed))
    if results.training is not None:
        parts.append(_training(results.training))
    parts += [paragraph(f"Note: {note}") for note in phrases.notes(results)]
    if results.parity.passed:
        parts.append(paragraph(phrases.summary(results)))
        parts.append(f"Report: {results.report}")
    else:
        parts.append("Parity FAILED: nothing was timed, no report was written.")
    return "\n\n".join(parts)


def deviations(parity: Parity) -> str:
    """The errors of every mixer and of the logits."""
    rows = [[d.name, phrases.shape(d.shape), *phrases.errors(d)] for d in parity.outputs]
    head = ("Parity with float64", "output", *phrases.ERRORS_HEAD)
    return f"{table(head, rows)}\n{phrases.parity_sentence(parity)}"


def latencies(speed: Speed) -> str:
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
                cells = [phrases.milliseconds(latency.seconds), phrases.times(latency.speedup)]
            row += cells if compared else cells[:1]
    parts = [table(head, list(rows.values()))]
    parts += [paragraph(line) for line in phrases.absent(speed)]
    parts.append(paragraph(phrases.speed_sentence(speed)))
    return "\n".join(parts)


def _training(training: Training) -> str:
    rows = table(("Training", *phrases.TRAINING_HEAD), phrases.training_rows(training))
    return f"{rows}\n{paragraph(phrases.training_sentence(training))}"


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns under a rule: the first `left` flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(head), rule, *(line(row) for row in rows)])
