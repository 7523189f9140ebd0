"""The result of one case, and the JSON files that results are written to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.case import Case, Settings
from casvit_kernels import _files, benchmark
from casvit_kernels.benchmark import Timing


class GradientError(NamedTuple):
    """Of several gradients the largest of each."""

    typical: float  # nine elements in ten err by less, as a part of the gradient's largest value
    norm: float  # of the error as a vector, as a part of the gradient's


@dataclass
class Measured:
    """Timings of one case, or the reason why it is refused."""

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # against float64, see compare.errors
    gradient_errors: dict[str, GradientError] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # see memory.of_call
    call_seconds: dict[str, float] = field(default_factory=dict)  # see benchmark.call_time
    failed: dict[str, str] = field(default_factory=dict)  # what went wrong, by candidate
    alone: set[str] = field(default_factory=set)  # timed, but not yet in turn with the others
    facts: dict[str, Any] = field(default_factory=dict)  # of the case, such as the CPU's peak
    row_facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a candidate
    refused: str | None = None

    def as_json(self) -> dict[str, Any]:
        described: dict[str, Any] = {**vars(self.case)}
        described |= self.facts
        if self.refused is not None:
            return {**described, "refused": self.refused}
        rows: list[dict[str, Any]] = [
            {
                "candidate": name,
                "median_s": _short(t.median),
                "p25_s": _short(t.p25),
                "p75_s": _short(t.p75),
                "rounds": t.rounds,
                "calls_per_round": t.calls,
                "max_error": self._max_error(name),
                **(
                    {"call_s": _short(self.call_seconds[name])} if name in self.call_seconds else {}
                ),
                **({"alone": True} if name in self.alone else {}),
                **self.memory.get(name, {}),
                **self.row_facts.get(name, {}),
            }
            for name, t in self.timings.items()
        ]
        rows += [{"candidate": n, "absent": reason} for n, reason in self.absent.items()]
        rows += [{"candidate": n, "error": reason} for n, reason in self.failed.items()]
        return {**described, "rows": rows}

    def _max_error(self, name: str) -> float | None:
        if name not in self.errors:
            return None
        return _short(max([self.errors[name], *self.gradient_errors.get(name, ())]))


def write(folder: Path, measured: list[Measured], settings: Settings) -> list[Path]:
    """One file for each level, model and device, `mixer-xs-cpu-amx.json`; each whole or not at all.

    A CPU is named by the instruction set of the kernels, so that results of several lie side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = benchmark.environment(settings.device)
    device, isa = environment["device"], environment["isa"]
    if device == "cpu" and isa is not None:
        device = f"cpu-{isa}"
    files: dict[str, list[Measured]] = {}
    for m in measured:
        name = f"{m.case.level}-{m.case.model}-{device}.json"
        files.setdefault(name, []).append(m)
    for name, cases in files.items():
        document = {
            "environment": environment,
            "settings": vars(settings),
            "cases": [m.as_json() for m in cases],
        }
        _files.write_text(folder / name, json.dumps(document, indent=1) + "\n")
    return [folder / name for name in files]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
