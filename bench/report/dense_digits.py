"""Detection and segmentation of digits with either mixer: the table of docs/dense_prediction.md."""

from __future__ import annotations

from bench.report.documents import NOT_MEASURED, Document

DIGITS_MARKS = "<!-- digits:begin -->", "<!-- digits:end -->"
GOAL, APART = 80.0, 1.0  # percent and percentage points
# Of each script: what it is judged by, and what else its val.csv has.
SCORES = {
    "segmentation": {"miou": "mIoU", "accuracy": "pixel accuracy"},
    "detection": {"ap50": "AP50", "ap": "AP", "ap75": "AP75"},
}


def digits_table(document: Document) -> list[str]:
    lines = [
        "| of val scenes, percent | fused mixers | plain mixers | difference, points |",
        "|---|---:|---:|---:|",
    ]
    verdicts, facts = [], []
    for kind, scores in SCORES.items():
        runs = document.get(kind, {})
        fused, plain = runs.get("fused"), runs.get("reference")
        for at, (name, title) in enumerate(scores.items()):
            ours, theirs = _percent(fused, name), _percent(plain, name)
            apart = _apart(fused[name] - plain[name]) if fused and plain else NOT_MEASURED
            lines.append(f"| {kind}, {title} | {ours} | {theirs} | {apart} |")
            if at == 0 and fused and plain:
                verdicts.append(_verdict(kind, title, fused[name], plain[name]))
        facts += [_machine(run) for run in (fused, plain) if run]
    return [*lines, "", *verdicts, "", *(f"{fact}." for fact in dict.fromkeys(facts))]


def _percent(run: Document | None, name: str) -> str:
    return NOT_MEASURED if run is None else f"{run[name]:.1f}"


def _apart(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}"  # never -0.0


def _verdict(kind: str, title: str, fused: float, plain: float) -> str:
    enough = "met" if min(fused, plain) >= GOAL else "missed"
    alike = "met" if abs(fused - plain) <= APART else "missed"
    return (
        f"- {kind}: {title} of at least {GOAL:g} % with both: {enough}; alike within {APART:g} point: "
        f"{alike} ({abs(fused - plain):.1f})"
    )


def _machine(run: Document) -> str:
    e = run["environment"]
    return (
        f"{e['cpu']} ({e['isa']} kernels), two processes of one thread, casvit_kernels "
        f"{e['casvit_kernels']}, torch {e['torch']}, {e['date'][:10]}"
    )
