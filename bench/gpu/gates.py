"""Verdicts: of one parity case, and on the mixers that a case is about to time."""

from __future__ import annotations

from typing import Any

from bench.gpu.schedule import mixer_shapes
from bench.gpu.store import Store
from bench.harness.case import Case
from bench.report import gate
from casvit_kernels import testing


def run_parity(case: testing.Case) -> dict[str, Any]:
    row = testing.verdict(case)
    if any("OutOfMemoryError" in failure for failure in row.failures):
        return {"absent": "it needs more memory than this GPU has", "passed": None}
    return {**row._asdict(), "device": case.device, "passed": row.passed}


def described(case: Case) -> dict[str, Any]:
    """The case as JSON, with what `refusal` of the report asks for."""
    return {**vars(case), "mixer_shapes": [list(shape) for shape in mixer_shapes(case)]}


def refusal(case: Case, backend: str, parity: Store) -> str | None:
    """Why a case must not be timed, or None."""
    return gate.refusal(described(case), backend, parity.document["cases"])


def is_judged(case: Case, backend: str, parity: Store) -> bool:
    """Whether there is a verdict on each of its mixers, red or green."""
    return gate.unjudged(described(case), backend, parity.document["cases"]) is None
