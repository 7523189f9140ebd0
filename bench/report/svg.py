"""docs/bench.svg."""

from __future__ import annotations

from xml.sax.saxutils import escape

from bench.report.canvas import opening
from bench.report.captions import machines
from bench.report.documents import MODELS, NOT_MEASURED, Document, by_set, find
from bench.report.verdict import Verdict, judge

LIGHT = ".bar { fill: #0969da } .small { fill: #59636e }"
DARK = ".bar { fill: #4493f8 } .small { fill: #9198a1 }"


def picture(documents: list[Document]) -> str:
    """docs/bench.svg: a bar for each stage, how many times faster than its best baseline."""
    documents = next(iter(by_set(documents)), [])
    bars = [
        (f"{model}, stage {stage}", judge(find(documents, "mixer", model, stage, 8)))
        for model in MODELS
        for stage in (1, 2, 3, 4)
    ]
    longest = max([2.0, *(v.ratio for _, v in bars if isinstance(v, Verdict))])
    left, top, row, span = 110, 76, 26, 400
    scale = span / longest
    axis = top + row * len(bars)
    # The machine, then the versions: one line would be wider than the picture.
    facts = "; ".join(machines(documents)) or NOT_MEASURED
    machine, mark, versions = facts.partition("casvit_kernels ")
    title = "Fused mixer: speed-up over the best baseline of each stage"
    out = [
        *opening(title, 720, axis + 44, LIGHT, DARK),
        f'<text class="small" x="12" y="44">224x224 input, fp32, batch 8. '
        f"{escape(machine.rstrip(', '))}</text>",
        f'<text class="small" x="12" y="60">{escape(mark + versions)}</text>',
    ]
    for index, (label, verdict) in enumerate(bars):
        y = top + row * index
        out.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        if isinstance(verdict, Verdict):
            width = verdict.ratio * scale
            note = f"{verdict.ratio:.2f}x {verdict.best_name}"
            out.append(
                f'<rect class="bar" x="{left}" y="{y + 4}" width="{width:.1f}" height="{row - 8}" '
                'rx="2"/>'
            )
        else:
            width, note = 0.0, verdict
        out.append(f'<text x="{left + width + 6:.1f}" y="{y + 17}">{escape(note)}</text>')
    one = left + scale
    out += [
        f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{axis}"/>',
        f'<line class="axis" x1="{one:.1f}" x2="{one:.1f}" y1="{top}" y2="{axis}" '
        'stroke-dasharray="3 3"/>',
        f'<text class="small" x="{one:.1f}" y="{axis + 16}" text-anchor="middle">1x</text>',
        f'<text class="small" x="{left}" y="{axis + 34}">times as fast as the fastest of eager, '
        "torch.compile (both layouts each) and ONNX Runtime</text>",
        "</svg>",
    ]
    return "\n".join(out) + "\n"
