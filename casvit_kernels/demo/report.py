"""The HTML report: fills `report.html.j2`; one file that loads nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup
from torch import Tensor

from . import page, phrases, plots
from .gates import StageGates
from .results import Results
from .speed import Latency, Speed, is_fused
from .training import Training

SHOWN = 8  # photographs with heat maps


def render(results: Results, pixels: Tensor, gates: Sequence[StageGates]) -> str:
    """The page.

    Args:
        results: everything measured; also embedded as JSON.
        pixels: the photographs ``(N, 224, 224, 3)``, uint8.
        gates: the maps of each stage's last mixer over these photographs.
    """
    return page.fill(
        "report.html.j2",
        results.as_json(),
        title=f"{results.model.name}: fused against PyTorch",
        results=results,
        phrases=phrases,
        is_fused=is_fused,
        parity=_parity(results),
        speed=results.speed and _speed(results.speed),
        training=results.training and _training(results.training),
        gates=_gates(results, pixels[:SHOWN], gates),
    )


def _parity(results: Results) -> dict[str, Any]:
    parity = results.parity
    return {
        "head": ("layer", "output", "largest value", *phrases.ERRORS_HEAD),
        "rows": [
            [d.name, phrases.shape(d.shape), f"{d.largest_output:.3g}", *phrases.errors(d)]
            for d in parity.outputs
        ],
    }


def _speed(speed: Speed) -> dict[str, Any]:
    rows = []
    for total in speed.mixers:
        found = [next(x for x in stage.latencies if x.name == total.name) for stage in speed.stages]
        rows.append([total.name, *(phrases.milliseconds(x.seconds) for x in (*found, total))])
    stages = [f"{stage.name}, {phrases.shape(stage.shape)}" for stage in speed.stages]
    return {
        "model_bars": _bars(speed.model, f"milliseconds for {speed.batch} photographs"),
        "model_head": ("implementation", "median", "middle half of the rounds", "against eager"),
        "model_rows": [
            [
                latency.name,
                phrases.milliseconds(latency.seconds),
                f"{phrases.milliseconds(latency.p25)} to {phrases.milliseconds(latency.p75)}",
                phrases.times(latency.speedup),
            ]
            for latency in speed.model
        ],
        "mixer_bars": _bars(speed.mixers, "milliseconds, sum of all mixers"),
        "mixer_head": ("implementation", *stages, "sum of all"),
        "mixer_rows": rows,
        "counts": " + ".join(str(stage.count) for stage in speed.stages),
    }


def _bars(latencies: Iterable[Latency], axis: str) -> Markup:
    items = [
        plots.Bar(
            latency.name,
            latency.seconds * 1e3,
            latency.p25 * 1e3,
            latency.p75 * 1e3,
            f"{phrases.milliseconds(latency.seconds)} ({phrases.times(latency.speedup)})",
            is_fused(latency.name),
        )
        for latency in latencies
    ]
    return Markup(plots.bars(items, axis))


def _training(training: Training) -> dict[str, Any]:
    return {
        "curves": Markup(plots.curves(training.reference.losses, training.fused.losses)),
        "head": ("network", *phrases.TRAINING_HEAD),
        "rows": phrases.training_rows(training),
    }


def _gates(results: Results, pixels: Tensor, gates: Sequence[StageGates]) -> dict[str, Any]:
    assert results.gates is not None
    columns, maps, ranges = [], [], []
    for kind in ("q", "k"):
        for stage, (found, limits) in enumerate(zip(gates, results.gates, strict=True), 1):
            values, (low, high) = getattr(found, kind), getattr(limits, kind)
            maps.append(values)
            ranges.append((low, high))
            columns.append(
                {
                    "kind": kind,
                    "stage": stage,
                    "shape": phrases.shape(values.shape[1:]),
                    "range": f"{low:.2f} to {high:.2f}",
                }
            )
    rows = [
        {
            "name": name,
            "photograph": plots.photograph(pixels[n]),
            "maps": [
                plots.heat_map(pixels[n], values[n], low, high)
                for values, (low, high) in zip(maps, ranges, strict=True)
            ],
        }
        for n, name in enumerate(results.photographs[: len(pixels)])
    ]
    return {
        "stages": len(gates),
        "columns": columns,
        "rows": rows,
        "scale": plots.scale_gradient(),
    }
