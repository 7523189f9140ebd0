"""No speed without parity: which verdicts a timed case needs, and what is left of one that lacks them.

A case needs green verdicts on its backend, dtype, mode and shape; what is red at another shape is no matter
of it. Where its own shape was not judged, `CHECKED_IMAGES` images of the same mixer count. Needs
nothing but Python.
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
    parity, mode = list(parity), mode_of(case)
    shapes = shapes_of(case)
    if not shapes:
        return "no speed: it does not say which mixers it computes"
    for shape in shapes:
        judged = verdicts(parity, backend, case["dtype"], mode, shape)
        judged = judged or verdicts(parity, backend, case["dtype"], mode, few(shape))
        red = [c["id"] for c in judged if not c.get("passed")]
        if red:
            return f"no speed: parity is red, {red[0]}"
        if not judged:
            text = "x".join(map(str, shape))
            return f"no speed: no parity case of {backend}, {case['dtype']}, {mode}, {text}"
    return None


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
