"""What is wanted of the mixers on a GPU, and whether it is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.report.documents import NOT_MEASURED, Case, Document

GPU_MODELS, GPU_BATCH = ("xs", "s", "m", "t"), 256
FLOOR_UNITS = 4  # maps of x: read q, k and v, write the output, once each
# With the library's product in front (read x, write q, k and v) no mixer reaches more than half the
# floor's speed. Without, gates and combine ask for 6 units, 0.67, unless L2 serves q and k again.
BEST_WITH_PRODUCT = 0.5


class Goal(NamedTuple):
    """What is wanted of mixers at 224x224 input in bfloat16; see `goal_lines`."""

    text: str
    level: str
    figure: Callable[[Case], float | None]
    least: float
    batch: int = GPU_BATCH
    stages: tuple[int, ...] = (1, 2)
    models: tuple[str, ...] = GPU_MODELS


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
        units = FLOOR_UNITS * case["batch"] * case["channels"] * case["size"] ** 2
        floor = _divide(units * 2, case.get("copy_bytes_per_s"))
        return _divide(floor, row_value(case, candidate))

    return figure


def _share_of_best(case: Case) -> float | None:
    return _divide(share_of_floor("fused channels_last")(case), BEST_WITH_PRODUCT)


def _one_after_the_other(case: Case, candidate: str) -> float | None:
    """Seconds that a call takes where calls follow each other: of GPU and CPU the slower."""
    gpu, cpu = (row_value(case, candidate, key) for key in ("median_s", "call_s"))
    return None if gpu is None or cpu is None else max(gpu, cpu)


def _not_slower(case: Case) -> float | None:
    """Over eager in its faster layout."""
    eager = [_one_after_the_other(case, name) for name in ("eager", "eager channels_last")]
    fused = _one_after_the_other(case, "fused channels_last")
    return _divide(min((t for t in eager if t is not None), default=None), fused)


def _less_kept(case: Case) -> float | None:
    return _divide(
        row_value(case, "eager channels_last", "kept_bytes"),
        row_value(case, "fused channels_last", "kept_bytes"),
    )


GOALS = (
    Goal(
        "forward after the qkv product, share of the memory floor",
        "mixer",
        share_of_floor("fused mix channels_last"),
        0.6,
    ),
    Goal("forward, share of the floor over the 0.5 that is possible", "mixer", _share_of_best, 0.6),
    Goal(
        "forward at batch 1 over eager, GPU or CPU time",
        "mixer",
        _not_slower,
        1.0,
        batch=1,
        stages=(1, 2, 3, 4),
        models=("xs",),
    ),
    Goal("forward over eager channels_last", "mixer", _times("eager channels_last"), 5.0),
    Goal("forward over max-autotune", "mixer", _times("max-autotune channels_last"), 2.0),
    Goal("step over eager channels_last", "training", _times("eager channels_last"), 3.0),
    Goal("step over max-autotune", "training", _times("max-autotune channels_last"), 1.7),
    Goal("times less kept for the backward", "training", _less_kept, 4.0),
)


def goal_lines(documents: Iterable[Document]) -> list[str]:
    """For each goal the worst of its mixers (bf16, 224x224 input)."""
    cases = [case for document in documents for case in document["cases"]]
    lines = []
    for goal in GOALS:
        figures = {}
        for model in goal.models:
            for stage in goal.stages:
                wanted = {"level": goal.level, "model": model, "stage": stage}
                wanted |= {"size": 112 >> stage, "batch": goal.batch, "dtype": "bfloat16"}
                for case in cases:
                    if wanted.items() <= case.items() and (value := goal.figure(case)) is not None:
                        figures[f"{model} stage {stage}"] = value
        lines.append(_goal_line(goal, figures, of=len(goal.models) * len(goal.stages)))
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
