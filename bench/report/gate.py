"""No speed without parity: which verdicts a timed case needs, and what is left of one without them.

A case needs green verdicts on its backend, dtype, mode and shape; what is red at another shape is no
matter of it. Where its own shape was not judged, `CHECKED_IMAGES` images of the same mixer count.
Needs nothing but Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.report.documents import Case, Document

CHECKED_IMAGES = 2
KEPT = ("id", "level", "model", "stage", "channels", "size", "batch", "dtype")


def mode_of(case: Case) -> str:
    return "train" if "training" in case["level"] else "eval"


def shapes_of(case: Case) -> list[tuple[int, ...]]:
    """Of the mixers that a case computes; those of a whole model are written into it."""
    if "mixer_shapes" in case:
        return [tuple(shape) for shape in case["mixer_shapes"]]
    if case["stage"] is None:
        return []
    return [(case["batch"], case["channels"], case["size"], case["size"])]


def few(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that is judged right before timing: fewer images of it."""
    return (min(shape[0], CHECKED_IMAGES), *shape[1:])


def verdicts(
    parity: Iterable[Case], backend: str, dtype: str, mode: str, shape: tuple[int, ...]
) -> list[Case]:
    """The parity cases of one shape, in every layout. By id: of a crash there is nothing else."""
    middle = f"-{mode}-{'x'.join(map(str, shape))}-"
    first = f"{backend}-{dtype}-"
    found = [c for c in parity if c["id"].startswith(first) and middle in c["id"]]
    return [case for case in found if "absent" not in case]


def refusal(case: Case, backend: str, parity: Iterable[Case]) -> str | None:
    """Why the speed of a case must not be reported, or None."""
    parity = list(parity)
    for shape in shapes_of(case):
        for verdict in _nearest(parity, backend, case, shape):
            if not verdict.get("passed"):
                return f"no speed: parity is red, {verdict['id']}"
    return unjudged(case, backend, parity)


def unjudged(case: Case, backend: str, parity: Iterable[Case]) -> str | None:
    """What of a case has no verdict, red or green, or None."""
    parity = list(parity)
    shapes = shapes_of(case)
    if not shapes:
        return "no speed: it does not say which mixers it computes"
    for shape in shapes:
        if not _nearest(parity, backend, case, shape):
            text = "-".join((backend, case["dtype"], mode_of(case), "x".join(map(str, shape))))
            return f"no speed: no parity case of {text}"
    return None


def _nearest(parity: list[Case], backend: str, case: Case, shape: tuple[int, ...]) -> list[Case]:
    """The verdicts on a shape; where there are none, those on a few images of it."""
    judged = verdicts(parity, backend, case["dtype"], mode_of(case), shape)
    return judged or verdicts(parity, backend, case["dtype"], mode_of(case), few(shape))


def gated(document: Document, parity: Document) -> Document:
    """The document with a reason instead of numbers in each case that parity does not allow."""
    backend = document["stamp"]["backend"]

    def gate(case: Case) -> dict[str, Any]:
        timed = case.get("rows") or case.get("kernels")
        reason = refusal(case, backend, parity["cases"]) if timed else None
        if reason is None:
            return case
        return {**{key: case[key] for key in KEPT if key in case}, "refused": reason}

    return {**document, "cases": [gate(case) for case in document["cases"]]}
