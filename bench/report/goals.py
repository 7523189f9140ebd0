"""What is wanted of the mixers on a GPU and of whole networks on a CPU, and whether it is reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.report.documents import NOT_MEASURED, Case, Document
from bench.report.verdict import Verdict, judge

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


class NetworkGoal(NamedTuple):
    """What is wanted of whole networks at 224x224 input; see `network_goal_lines`."""

    text: str
    figure: Callable[[Case], float | None]
    least: float
    dtype: str
    models: tuple[str, ...] = GPU_MODELS
    batches: tuple[int, ...] = (1, 8)


def network_value(case: Case, candidate: str, key: str = "median_s") -> float | None:
    """As `row_value`, in the case's own precision."""
    name = candidate + (" bf16" if case["dtype"] == "bfloat16" else "")
    return next((r.get(key) for r in case.get("rows", ()) if r["candidate"] == name), None)


def over_best_rival(case: Case) -> float | None:
    """How many times as fast as the best rival the network in one call is."""
    found = judge(case)
    return found.ratio if isinstance(found, Verdict) else None


def over(rival: str) -> Callable[[Case], float | None]:
    """How many times as fast as a rival it is."""

    def figure(case: Case) -> float | None:
        return _divide(network_value(case, rival), network_value(case, "fused network"))

    return figure


def share_of_peak(case: Case, candidate: str = "fused network") -> float | None:
    """The rate of multiply-adds over what the CPU reached in the same process of measurement."""
    seconds, peak = network_value(case, candidate), case.get("peak_macs_per_s")
    return _divide(case["batch"] * case["macs"], seconds * peak if seconds and peak else None)


def _as_exact_as_openvino(case: Case) -> float | None:
    """The error of OpenVINO over ours."""
    errors = [network_value(case, name, "max_error") for name in ("openvino", "fused network")]
    return _divide(*errors)


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


_BEST, _OPENVINO = "over the best rival", "over OpenVINO's bf16"
_SHARE = "share of the CPU's measured peak"
_AVX512 = (
    NetworkGoal(f"xs in fp32 {_BEST}", over_best_rival, 1.3, "float32", ("xs",)),
    NetworkGoal(f"t in fp32 {_BEST}", over_best_rival, 1.25, "float32", ("t",)),
    NetworkGoal(f"xs in bf16 {_OPENVINO}", over("openvino"), 1.35, "bfloat16", ("xs",)),
    NetworkGoal(f"t in bf16 {_OPENVINO}", over("openvino"), 1.2, "bfloat16", ("t",)),
    NetworkGoal(f"xs in fp32, {_SHARE}", share_of_peak, 0.78, "float32", ("xs",)),
    NetworkGoal(f"t in fp32, {_SHARE}", share_of_peak, 0.85, "float32", ("t",)),
)
_EXACT = NetworkGoal(
    "OpenVINO's largest error in bf16 over ours", _as_exact_as_openvino, 1.0, "bfloat16"
)
# By the instruction set in use.
NETWORK_GOALS = {
    "avx512": tuple(goal for goal in _AVX512 if goal.dtype == "float32"),
    "avx512_bf16": (*_AVX512, _EXACT),
    "amx": (
        NetworkGoal(f"in fp32 {_BEST}", over_best_rival, 1.0, "float32"),
        NetworkGoal(f"in bf16 {_BEST}", over_best_rival, 1.0, "bfloat16"),
        _EXACT,
    ),
    "avx2": (NetworkGoal("in fp32 over ONNX Runtime", over("onnxruntime"), 1.0, "float32"),),
}


def network_goal_lines(documents: Iterable[Document], isa: str) -> list[str]:
    """For each goal of an instruction set the worst of its networks."""
    cases = [case for document in documents for case in document["cases"]]
    lines = []
    for goal in NETWORK_GOALS.get(isa, ()):
        figures = {}
        for case in cases:
            wanted = case["level"] == "network" and case["size"] == 224
            wanted = wanted and case["dtype"] == goal.dtype and case["batch"] in goal.batches
            if wanted and case["model"] in goal.models and (value := goal.figure(case)) is not None:
                figures[f"{case['model']} batch {case['batch']}"] = value
        lines.append(_goal_line(goal, figures, of=len(goal.models) * len(goal.batches)))
    return lines


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


def _goal_line(goal: Goal | NetworkGoal, figures: dict[str, float], of: int) -> str:
    text = f"{goal.text} (goal {goal.least:g})"
    if not figures:
        return f"{text}: {NOT_MEASURED}"
    worst = min(figures, key=lambda name: figures[name])
    verdict = "met" if figures[worst] >= goal.least else "missed"
    if verdict == "met" and len(figures) < of:
        verdict = "met where measured"
    return f"{text}: {verdict}, {figures[worst]:.2f} at worst ({worst}; {len(figures)} of {of} measured)"
