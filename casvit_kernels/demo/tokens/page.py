"""What people read: the HTML page, filled from `tokens.html.j2`, and the text of the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from .. import page
from ..phrases import facts, milliseconds, times
from ..terminal import paragraph, table
from .pictures import png
from .results import Results


class Row(NamedTuple):
    """The pictures of a photograph, uint8."""

    name: str
    borders: Tensor  # (S, S, 3)
    before: Tensor  # (H, W, 3)
    after: Tensor  # (H, W, 3)


def render(results: Results, rows: Sequence[Row]) -> str:
    """The page; one file that loads nothing else."""
    return page.fill(
        "tokens.html.j2",
        results.as_json(),
        title=f"{results.model.name}: token clustering",
        results=results,
        summary=summary(results),
        notes=list(notes(results)),
        figures=list(figures(results)),
        timing=timing(results),
        environment=list(environment(results)),
        rows=[
            {
                "photograph": photograph,
                "borders": png(row.borders),
                "before": png(row.before),
                "after": png(row.after),
            }
            for photograph, row in zip(results.photographs, rows, strict=True)
        ],
    )


def text(results: Results) -> str:
    """For the terminal, what was found out last."""
    rows = [[p.name, str(p.clusters), f"{p.similarity:.3f}"] for p in results.photographs]
    parts = [table(("Photograph", "clusters", "similarity of the maps"), rows)]
    parts += [paragraph(f"Note: {note}") for note in notes(results)]
    parts += [results.expedited.text, paragraph(summary(results)), f"Page: {results.report}"]
    return "\n\n".join(parts)


def summary(results: Results) -> str:
    """What came out, in a sentence or two."""
    e, speed = results.expedited, results.speed
    return (
        f"{results.model.name} at {results.size} pixels: blocks {e.at + 1} to {e.until} of {e.depth} "
        f"run on {e.tokens_after} tokens instead of {e.tokens_before}. An image takes "
        f"{milliseconds(speed.expedited.seconds)} instead of {milliseconds(speed.plain.seconds)}, "
        f"{times(speed.ratio)} the images a second; the MACs would allow "
        f"{times(e.macs_before / e.macs_after)}. {timing(results)}"
    )


def timing(results: Results) -> str:
    speed = results.speed
    threads = "1 thread" if speed.threads == 1 else f"{speed.threads} threads"
    weights = "random weights" if results.model.checkpoint is None else "weights of the checkpoint"
    return (
        f"Measured with {threads}, {weights}, float32, one image at a time: the medians of "
        f"{speed.rounds} rounds in which both models take turns."
    )


def notes(results: Results) -> Iterator[str]:
    """What a reader must know to read pictures and figures rightly."""
    if results.model.checkpoint is None:
        yield (
            "The weights are random: no checkpoint was given (--checkpoint). Speed does not depend on "
            "them; clusters and feature maps do, and say nothing of a trained model."
        )
    if results.model.backend == "reference":
        yield (
            "The fused kernels are not in use here: clustering ran in plain PyTorch. 'casvit-kernels "
            "info' says why."
        )
    used = len(results.photographs)
    if results.photographs_found > used:
        yield f"The first {used} of {results.photographs_found} photographs were used."


def figures(results: Results) -> Iterator[tuple[str, str, str]]:
    """The headline numbers: name, value, detail."""
    e, speed = results.expedited, results.speed
    yield (
        "images a second against the plain model",
        times(speed.ratio),
        f"{milliseconds(speed.expedited.seconds)} against {milliseconds(speed.plain.seconds)}",
    )
    yield (
        "fewer multiply-accumulates",
        times(e.macs_before / e.macs_after),
        f"{e.macs_after / 1e9:.2f} G against {e.macs_before / 1e9:.2f} G",
    )
    yield (
        f"tokens in blocks {e.at + 1} to {e.until}",
        str(e.tokens_after),
        f"against {e.tokens_before}, of which {e.prefix} class or register",
    )


def environment(results: Results) -> Iterator[tuple[str, str]]:
    yield from facts(results.environment)
    model = results.model
    yield "model", f"{model.name}, {model.parameters:,} parameters without its classifier"
    yield "weights", model.checkpoint or "random"
    yield "backend", model.backend
