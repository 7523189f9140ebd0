"""The fused candidate of a case beside its fastest baseline."""

from __future__ import annotations

from typing import NamedTuple

from bench.report.documents import NOT_MEASURED, Case


class Verdict(NamedTuple):
    """The fused candidate of one case and the fastest baseline; milliseconds."""

    fused: float
    fused_name: str
    best: float
    best_name: str
    eager: float

    @property
    def ratio(self) -> float:
        return self.best / self.fused


def judge(case: Case | None, layout: str = "") -> Verdict | str:
    """The figures of one case, or in words why there are none.

    `layout` is " channels_last" for the fused candidate of that layout. Of a whole model on the CPU,
    whose other layers are PyTorch's, it is the fastest fused candidate of both layouts, compiled or not
    (of a dense backbone also the one in one call); of a whole network the one in one call.
    """
    if case is None:
        return NOT_MEASURED
    if "refused" in case or "error" in case:
        return "refused"
    suffix = " bf16" if case["dtype"] == "bfloat16" else ""
    ms = {r["candidate"]: 1e3 * r["median_s"] for r in case["rows"] if "median_s" in r}
    rivals = [name for name in ms if not name.startswith("fused")]
    layout = " network" if case["level"] == "network" else layout
    fused, eager = "fused" + layout + suffix, "eager" + suffix
    if fused not in ms or eager not in ms:
        return NOT_MEASURED
    if case["level"] in ("model", "dense") and not layout:
        fused = min((name for name in ms if name.startswith("fused")), key=lambda name: ms[name])
    best = min(rivals, key=lambda name: ms[name])
    return Verdict(ms[fused], fused, ms[best], best, ms[eager])


def columns(verdict: Verdict | str) -> list[str]:
    """Milliseconds of both, speed-up and speed-up over eager, as cells of a table."""
    if not isinstance(verdict, Verdict):
        return [verdict] * 4
    name = "" if verdict.fused_name == "fused" else f" ({verdict.fused_name})"
    return [
        f"{verdict.fused:.3g}{name}",
        f"{verdict.best:.3g} ({verdict.best_name})",
        f"**{verdict.ratio:.2f}x**",
        f"{verdict.eager / verdict.fused:.2f}x",
    ]


def ratio(verdict: Verdict | str) -> str:
    """The speed-up alone."""
    return f"{verdict.ratio:.2f}x" if isinstance(verdict, Verdict) else verdict
