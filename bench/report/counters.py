"""What the profiler saw of the forward's kernels, and what follows from it."""

from __future__ import annotations

from typing import Any

from bench.report.captions import case_title
from bench.report.documents import NOT_MEASURED, Case, Document

GATES_UNITS = 2  # maps of x that the gates kernel must read: q and k
# What loading and computing may take longer together than loading alone, at stage 1 of xs, 256 images.
OVERLAP_GOAL_S = 25e-6
COLUMNS = {  # of a kernel: key in the JSON, its caption, factor and digits
    "duration_s": ("time, us", 1e6),
    "dram_bytes": ("DRAM traffic, MB", 1e-6),
    "issue_percent": ("issue slots used, %", 1.0),
    "tensor_percent": ("tensor pipe used, %", 1.0),
}


def counter_table(document: Document) -> list[str]:
    """One row for each kernel; below it why something is missing."""
    lines = ["| case | kernel | " + " | ".join(text for text, _ in COLUMNS.values()) + " |"]
    lines.append("|---|---|" + "---:|" * len(COLUMNS))
    gaps = []
    for case in document["cases"]:
        for kernel in case.get("kernels", ()):
            cells = [_cell(kernel, key, factor) for key, (_, factor) in COLUMNS.items()]
            lines.append(f"| {case_title(case)} | {kernel['name']} | {' | '.join(cells)} |")
        for key in ("refused", "error", "absent"):
            if key in case:
                gaps.append(f"{case['id']} {NOT_MEASURED}: {case[key]}.")
    return [*lines, *(line for gap in dict.fromkeys(gaps) for line in ("", gap))]


def _cell(kernel: dict[str, Any], key: str, factor: float) -> str:
    value = kernel.get(key)
    return NOT_MEASURED if value is None else f"{factor * value:.3g}"


def beyond_loading(case: Case) -> float | None:
    """Seconds of the gates kernel beyond those of loading its bytes as fast as a copy does."""
    times = [k["duration_s"] for k in case.get("kernels", ()) if k["name"] == "gates"]
    if not times or not case.get("copy_bytes_per_s"):
        return None
    values = GATES_UNITS * case["batch"] * case["channels"] * case["size"] ** 2
    return float(times[0] - 2 * values / case["copy_bytes_per_s"])


def diagnosis(document: Document | None) -> list[str]:
    """What to build next, where the counters of stage 1 say it."""
    for case in document["cases"] if document is not None else ():
        seconds = beyond_loading(case) if case.get("stage") == 1 else None
        if seconds is None:
            continue
        text = f"gates at stage 1: {1e6 * seconds:.0f} us more than loading its bytes takes"
        limit = f"{1e6 * OVERLAP_GOAL_S:.0f} us"
        if seconds > OVERLAP_GOAL_S:
            return [f"{text}, over {limit}: a persistent pipeline is the next thing to build"]
        return [f"{text}, within {limit}"]
    return [f"gates at stage 1 against loading its bytes: {NOT_MEASURED}"]
