"""The shape of the results and how a case is found in them."""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]
Case = dict[str, Any]

NOT_MEASURED = "not measured"
MODELS = ("xs", "t")
# The instruction sets of the CPU kernels: README's table is of the first that was measured.
SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
SPEED = (
    "mixer",
    "training",
    "model",
    "model-training",
)  # files of bench/gpu; the others are verdicts


class ReportError(Exception):
    """The results or the README do not allow a report; the message says why."""


def by_set(documents: list[Document]) -> list[list[Document]]:
    """What README shows, for each instruction set of the CPU kernels; the best set first."""
    found: dict[str, list[Document]] = {}
    for document in documents:
        if any(c["level"] in SPEED and c["model"] in MODELS for c in document["cases"]):
            found.setdefault(document["environment"]["isa"] or "none", []).append(document)
    return [
        found[n] for n in sorted(found, key=lambda n: SETS.index(n) if n in SETS else len(SETS))
    ]


def find(
    documents: list[Document],
    level: str,
    model: str,
    stage: int | None,
    batch: int,
    dtype: str = "float32",
) -> Case | None:
    wanted = {"level": level, "model": model, "stage": stage, "batch": batch, "dtype": dtype}
    for document in documents:
        for case in document["cases"]:
            if wanted.items() <= case.items():
                return dict(case)
    return None
