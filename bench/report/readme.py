"""The table of README.md."""

from __future__ import annotations

from bench.report.captions import gpu_machine, machines, missing
from bench.report.documents import MODELS, NOT_MEASURED, SPEED, Case, Document, by_set, find
from bench.report.goals import goal_lines
from bench.report.verdict import Verdict, judge

COMMAND = "pytest bench/ --benchmark-only --json-dir bench/results && python bench/report"


def readme_table(
    documents: list[Document], gpus: dict[str, dict[str, Document]] | None = None
) -> str:
    """The text between the markers of README.md."""
    documents, *others = by_set(documents) or [[]]
    lines = [
        "| 224x224 input, fp32, batch 8 | fused, ms | best baseline, ms | speed-up | over eager | "
        "speed-up at batch 1 | training step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for stage in (1, 2, 3, 4):
            eight = find(documents, "mixer", model, stage, 8)
            title = f"mixer, {model} stage {stage}"
            if eight is not None:
                title += f" ({eight['channels']}, {eight['size']}x{eight['size']})"
            one = find(documents, "mixer", model, stage, 1)
            step = find(documents, "training", model, stage, 8)
            lines.append(_readme_row(title, eight, one, step))
    for model in MODELS:
        pair = (find(documents, "model", model, None, batch) for batch in (8, 1))
        lines.append(_readme_row(f"whole rcvit_{model}", *pair, None))
    if not gpus:
        lines.append("| any GPU | " + " | ".join([NOT_MEASURED] * 6) + " |")
    lines += ["", *_caption(documents)]
    for other in others:
        lines += ["", *ratios(other)]
    lines += ["", "![Speed-up by stage](docs/bench.svg)"]
    for parts in (gpus or {}).values():
        title = f"Mixers of stages 1 and 2 on {gpu_machine(next(iter(parts.values())))}"
        lines += ["", f"{title}; bfloat16, batch 256, 224x224 input:", ""]
        lines += [f"- {line}" for line in goal_lines(parts[p] for p in SPEED if p in parts)]
    return "\n".join(lines)


def ratios(documents: list[Document]) -> list[str]:
    """The speed-ups alone, of another CPU than README's table is of."""
    stages: list[tuple[str, int | None]] = [(m, s) for m in MODELS for s in (1, 2, 3, 4)]
    columns = stages + [(model, None) for model in MODELS]
    kinds = (
        ("fp32, batch 8", "", 8, "float32"),
        ("fp32, batch 1", "", 1, "float32"),
        ("bf16, batch 8", "", 8, "bfloat16"),
        ("training step, fp32", "training", 8, "float32"),
        ("training step, bf16", "training", 8, "bfloat16"),
    )
    heads = [f"{m} stage {s}" if s else f"whole {m}" for m, s in columns]
    lines = [
        f"Speed-up over the best baseline with other kernels, {'; '.join(machines(documents))}:",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for title, level, batch, dtype in kinds:
        cells = []
        for model, stage in columns:
            own = level or ("mixer" if stage else "model")
            verdict = judge(find(documents, own, model, stage, batch, dtype))
            cells.append(f"{verdict.ratio:.2f}x" if isinstance(verdict, Verdict) else verdict)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    gaps = missing([c for d in documents for c in d["cases"] if c["model"] in MODELS])
    return [*lines, "", *gaps] if gaps else lines


def _readme_row(title: str, eight: Case | None, one: Case | None, step: Case | None) -> str:
    at_eight = judge(eight)
    if isinstance(at_eight, Verdict):
        cells = [
            f"{at_eight.fused:.3g}"
            + (f" ({name})" if (name := at_eight.fused_name) != "fused" else ""),
            f"{at_eight.best:.3g} ({at_eight.best_name})",
            f"**{at_eight.ratio:.2f}x**",
            f"{at_eight.eager / at_eight.fused:.2f}x",
        ]
    else:
        cells = [at_eight] * 4
    for verdict in (judge(one), judge(step)):
        cells.append(f"{verdict.ratio:.2f}x" if isinstance(verdict, Verdict) else verdict)
    return f"| {title} | {' | '.join(cells)} |"


def _caption(documents: list[Document]) -> list[str]:
    lines = [
        "Medians over rounds that call every candidate in turn, in one process; best baseline of "
    ]
    lines[0] += (
        "eager, torch.compile (both with contiguous and channels-last memory) and ONNX Runtime. "
        "Training step: forward and backward with batch statistics at batch 8, without ONNX Runtime."
    )
    lines += [f"{facts}." for facts in machines(documents)]
    shown = [c for d in documents for c in d["cases"] if c["model"] in MODELS]
    lines += missing(shown)
    lines.append("Complete tables: [bench/results](bench/results/README.md). Again with:")
    lines.append(f"`{COMMAND}`")
    return lines
