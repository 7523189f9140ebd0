"""The HTML report: one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from torch import Tensor

from . import plots, words
from .gates import StageGates
from .results import Results
from .speed import Latency, Speed, is_fused
from .style import STYLE
from .training import Training

SHOWN = 8  # photographs with heat maps


def render(results: Results, pixels: Tensor, gates: Sequence[StageGates]) -> str:
    """The page.

    Args:
        results: everything measured; also embedded as JSON.
        pixels: the photographs ``(N, 224, 224, 3)``, uint8.
        gates: the maps of each stage's last mixer over these photographs.
    """
    sections = [
        _parity(results),
        _speed(results.speed) if results.speed else "",
        _training(results.training) if results.training else "",
        _gates(results, pixels[:SHOWN], gates),
        _environment(results),
    ]
    # A "<" could end the script element; written so it is the same JSON.
    data = json.dumps(results.as_json()).replace("<", "\\u003c")
    title = f"{results.model.name}: fused against PyTorch"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">casvit-kernels {escape(str(results.version))}</p>
<h1>{escape(title)}</h1>
<p class="lead">{escape(words.summary(results))}</p>
{_note(results)}
{_figures(results)}
</header>
{"".join(sections)}
<footer>
<p>CAS-ViT: Convolutional Additive Self-attention Vision Transformers for Efficient Mobile
Applications, arXiv 2408.03703. Every number above is in the JSON at the end of this file
(<code>script#results</code>).</p>
</footer>
</main>
<script type="application/json" id="results">{data}</script>
</body>
</html>
"""


def _note(results: Results) -> str:
    notes = words.notes(results)
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _figures(results: Results) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(detail)}</dd></div>"
        for name, value, detail in words.figures(results)
    )
    return f'<dl class="figures">{tiles}</dl>'


def _parity(results: Results) -> str:
    parity = results.parity
    head = ("layer", "output", "largest value", *words.ERRORS_HEAD)
    rows = [
        [d.name, words.shape(d.shape), f"{d.largest_output:.3g}", *words.errors(d)]
        for d in (*parity.layers, parity.logits)
    ]
    return _section(
        "parity",
        "Parity",
        f"""<p>{escape(words.parity_sentence(parity))} Errors are the largest
absolute differences to the same formulas in float64, on the activations that {parity.images}
photographs cause in the network. The ratio of the two may be at most {words.MOST_RATIO}; for it,
PyTorch's error counts as at least one rounding unit of the largest value.</p>
{_table(head, rows)}""",
    )


def _speed(speed: Speed) -> str:
    absent = "".join(f"<p>{escape(line)}</p>" for line in words.absent(speed))
    stages = speed.stages
    head = ("implementation", *(f"{s.name}, {words.shape(s.shape)}" for s in stages), "sum of all")
    rows = []
    for total in speed.mixers:
        found = [next(x for x in stage.latencies if x.name == total.name) for stage in stages]
        rows.append([total.name, *(words.milliseconds(x.seconds) for x in (*found, total))])
    counts = " + ".join(str(stage.count) for stage in stages)
    return _section(
        "speed",
        "Latency",
        f"""<p>{escape(words.speed_sentence(speed))}</p>
<h3>Whole model</h3>
{_bars(speed.model, f"milliseconds for {speed.batch} photographs")}
{_latencies(speed.model)}
<h3>Its token mixers alone</h3>
<p>One mixer of each stage was measured, on its real input; the sum counts every mixer of the network
({counts}).</p>
{_bars(speed.mixers, "milliseconds, sum of all mixers")}
{_table(head, rows)}
{absent}""",
    )


def _bars(latencies: Iterable[Latency], axis: str) -> str:
    items = [
        plots.Bar(
            latency.name,
            latency.seconds * 1e3,
            latency.p25 * 1e3,
            latency.p75 * 1e3,
            f"{words.milliseconds(latency.seconds)} ({words.times(latency.speedup)})",
            is_fused(latency.name),
        )
        for latency in latencies
    ]
    return f"<figure>{plots.bars(items, axis)}</figure>"


def _latencies(latencies: Iterable[Latency]) -> str:
    head = ("implementation", "median", "middle half of the rounds", "against eager")
    rows = [
        [
            latency.name,
            words.milliseconds(latency.seconds),
            f"{words.milliseconds(latency.p25)} to {words.milliseconds(latency.p75)}",
            words.times(latency.speedup),
        ]
        for latency in latencies
    ]
    return _table(head, rows)


def _training(training: Training) -> str:
    return _section(
        "training",
        "Training",
        f"""<p>{escape(words.training_sentence(training))}</p>
<figure>{plots.curves(training.reference.losses, training.fused.losses)}</figure>
{_table(("network", *words.TRAINING_HEAD), words.training_rows(training))}""",
    )


def _gates(results: Results, pixels: Tensor, gates: Sequence[StageGates]) -> str:
    assert results.gates is not None
    count = len(gates)
    columns = [(kind, i) for kind in ("q", "k") for i in range(count)]
    maps = [getattr(gates[i], kind) for kind, i in columns]
    ranges = [getattr(results.gates[i], kind) for kind, i in columns]
    stage_heads = "".join(
        f"<th>stage {i + 1}<small>{words.shape(m.shape[1:])}<br>"
        f"{low:.2f} to {high:.2f}</small></th>"
        for (_, i), m, (low, high) in zip(columns, maps, ranges, strict=True)
    )
    rows = []
    for n, name in enumerate(results.photographs[: len(pixels)]):
        cells = [f'<th><img alt="{escape(name)}" src="{plots.photograph(pixels[n])}"></th>']
        for (kind, i), m, (low, high) in zip(columns, maps, ranges, strict=True):
            source = plots.heat_map(pixels[n], m[n], low, high)
            alt = f"{escape(name)}: {kind} gate of stage {i + 1}"
            cells.append(f'<td><img alt="{alt}" src="{source}"></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _section(
        "gates",
        "Spatial gates",
        f"""<p>{escape(words.gates_sentence(results))}</p>
<div class="wide"><table class="maps">
<thead><tr><th></th><th colspan="{count}">gate of q</th><th colspan="{count}">gate of k</th></tr>
<tr><th></th>{stage_heads}</tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>
<p class="scale"><span>lowest of its column</span>
<i style="background: {plots.scale_gradient()}"></i><span>highest</span></p>""",
    )


def _environment(results: Results) -> str:
    rows = [[name, value] for name, value in words.environment(results)]
    body = "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in rows)
    return _section("environment", "Environment", f'<table class="facts">{body}</table>')


def _section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{'' if i < left else ' class=n'}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(
        f"<tr{' class=fused' if is_fused(row[0]) else ''}>{line('td', row)}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{line("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
