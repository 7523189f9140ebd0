"""What is wanted of the mixers on a GPU, and whether it is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.report.documents import NOT_MEASURED, Case, Document

GPU_MODELS, GPU_BATCH = ("xs", "s", "m", "t"), 256


class Goal(NamedTuple):
    """What is wanted of the mixers of stages 1 and 2; see `goal_lines`."""

    text: str
    level: str
    figure: Callable[[Case], float | None]
    least: float


def row_value(case: Case, candidate: str, key: str = "median_s") -> float | None:
    name = f"{candidate} bf16"
    return next((r.get(key) for r in case.get("rows", ()) if r["candidate"] == name), None)


def _divide(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _times(baseline: str) -> Callable[[Case], float | None]:
    """How many times faster than a baseline."""

    def figure(case: Case) -> float | None:
        return _divide(row_value(case, baseline), row_value(case, "fused channels_last"))

    return figure


def share_of_floor(candidate: str) -> Callable[[Case], float | None]:
    """The time to read q, k, v and write the output once, over the candidate's."""

    def figure(case: Case) -> float | None:
        units = 4 * case["batch"] * case["channels"] * case["size"] ** 2
        return _divide(units * 2 / case["copy_bytes_per_s"], row_value(case, candidate))

    return figure


def _less_kept(case: Case) -> float | None:
    return _divide(
        row_value(case, "eager channels_last", "kept_bytes"),
        row_value(case, "fused channels_last", "kept_bytes"),
    )


GOALS = (
    Goal("forward, share of the memory floor", "mixer", share_of_floor("fused channels_last"), 0.6),
    Goal(
        "forward after the qkv product, share",
        "mixer",
        share_of_floor("fused mix channels_last"),
        0.6,
    ),
    Goal("forward over eager channels_last", "mixer", _times("eager channels_last"), 5.0),
    Goal("forward over max-autotune", "mixer", _times("max-autotune channels_last"), 2.0),
    Goal("step over eager channels_last", "training", _times("eager channels_last"), 3.0),
    Goal("step over max-autotune", "training", _times("max-autotune channels_last"), 1.7),
    Goal("times less kept for the backward", "training", _less_kept, 4.0),
)


def goal_lines(documents: Iterable[Document]) -> list[str]:
    """For each goal the worst of the mixers of stages 1 and 2 (bf16, batch 256, 224x224 input)."""
    cases = [case for document in documents for case in document["cases"]]
    lines = []
    for goal in GOALS:
        figures = {}
        for model in GPU_MODELS:
            for stage in (1, 2):
                wanted = {"level": goal.level, "model": model, "stage": stage}
                wanted |= {"size": 112 >> stage, "batch": GPU_BATCH, "dtype": "bfloat16"}
                for case in cases:
                    if wanted.items() <= case.items() and (value := goal.figure(case)) is not None:
                        figures[f"{model} stage {stage}"] = value
        lines.append(_goal_line(goal, figures, of=2 * len(GPU_MODELS)))
    return lines


def _goal_line(goal: Goal, figures: dict[str, float], of: int) -> str:
    text = f"{goal.text} (goal {goal.least:g})"
    if not figures:
        return f"{text}: {NOT_MEASURED}"
    worst = min(figures, key=lambda name: figures[name])
    verdict = "met" if figures[worst] >= goal.least else "missed"
    if verdict == "met" and len(figures) < of:
        verdict = "met where measured"
    return f"{text}: {verdict}, {figures[worst]:.2f} at worst ({worst}; {len(figures)} of {of} measured)"
