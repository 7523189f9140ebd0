"""Dense backbones on the CPU: the section of docs/performance.md."""

from __future__ import annotations

from bench.report.captions import machine, missing
from bench.report.documents import MODELS, NOT_MEASURED, SETS, Case, Document
from bench.report.verdict import Verdict, judge

LEVEL, MIXERS = "dense", "dense-mixer"
SIZES = ((512, 512), (800, 1333))
BATCHES = (1, 2)
STRIDES = (4, 8, 16, 32)
INTRODUCTION = """\
## Dense backbones

`fork_feat`, the maps of all four stages, at the sizes of segmenters (512x512) and detectors (800x1333);
fp32, random weights. All candidates in turn in one process, by

    pytest bench/levels/test_dense*.py --benchmark-only --json-dir bench/results

Speed-up: the best of eager, `torch.compile` (both in either layout) and ONNX Runtime over the fastest of
ours. `fuse`: in the faster layout. Mixers: the same for the mixer of each stage on the maps that it gets
there. Memory of a training step: what forward and backward make resident at most, beyond weights and
images, plain and fused, with frozen BatchNorms as in the published recipes; a process for each."""
COLUMNS = {
    "eager": ("eager", "eager channels_last"),
    "`torch.compile`": ("compile", "compile channels_last"),
    "ONNX Runtime": ("onnxruntime",),
    "`fuse`": ("fused", "fused channels_last"),
    "`fuse_network`": ("fused network",),
}


def by_set(documents: list[Document]) -> dict[str, list[Document]]:
    """By the instruction set of the kernels, the best first."""
    found: dict[str, list[Document]] = {}
    for document in documents:
        if any(case["level"] in (LEVEL, MIXERS) for case in document["cases"]):
            found.setdefault(document["environment"]["isa"] or "none", []).append(document)
    return dict(sorted(found.items(), key=lambda item: (*SETS, item[0]).index(item[0])))


def overview(documents: list[Document]) -> list[str]:
    """The section."""
    lines = [INTRODUCTION]
    sets = by_set(documents)
    if not sets:
        lines += ["", f"Any CPU: {NOT_MEASURED}."]
    for isa, of_set in sets.items():
        cases = [case for document in of_set for case in document["cases"]]
        lines += ["", f"### {isa}", ""]
        lines += [f"{text}." for text in dict.fromkeys(machine(document) for document in of_set)]
        lines += ["", *_speeds(cases), "", *_mixers(cases)]
        gaps = missing(cases)
        lines += ["", *gaps] if gaps else []
    return lines


def _find(
    cases: list[Case], level: str, model: str, stage: int | None, size: tuple[int, int], batch: int
) -> Case | None:
    for case in cases:
        shape = (case["size"], case.get("width") or case["size"])
        if (case["level"], case["model"], case["stage"], shape, case["batch"]) == (
            level, model, stage, size, batch,
        ):  # fmt: skip
            return case
    return None


def _problems() -> list[tuple[str, tuple[int, int], int, str]]:
    return [
        (model, size, batch, f"rcvit_{model}, {size[0]}x{size[1]}, batch {batch}")
        for model in MODELS
        for size in SIZES
        for batch in BATCHES
    ]


def _speeds(cases: list[Case]) -> list[str]:
    columns = [f"{name}, ms" for name in COLUMNS]
    columns += ["speed-up", "training step, plain, MiB", "fused, MiB", "times less"]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for model, size, batch, title in _problems():
        case = _find(cases, LEVEL, model, None, size, batch)
        lines.append(f"| {title} | {' | '.join(_cells(case))} |")
    return lines


def _cells(case: Case | None) -> list[str]:
    found = judge(case)
    if case is None or not isinstance(found, Verdict):
        return [str(found)] * (len(COLUMNS) + 4)
    rows = {row["candidate"]: row for row in case["rows"] if "median_s" in row}
    cells = []
    for names in COLUMNS.values():
        seconds = min((rows[name]["median_s"] for name in names if name in rows), default=None)
        cells.append(NOT_MEASURED if seconds is None else f"{1e3 * seconds:.3g}")
    cells.append(f"**{found.ratio:.2f}x**")
    peaks = [rows.get(name, {}).get("step_peak_bytes") for name in ("eager", "fused")]
    cells += [NOT_MEASURED if peak is None else f"{peak / 2**20:,.0f}" for peak in peaks]
    cells.append(f"{peaks[0] / peaks[1]:.2f}x" if all(peaks) else NOT_MEASURED)
    return cells


def _mixers(cases: list[Case]) -> list[str]:
    lines = [
        "| speed-up of the mixer | stage 1 | stage 2 | stage 3 | stage 4 |",
        "|---|---:|---:|---:|---:|",
    ]
    for model, (height, width), batch, title in _problems():
        cells = []
        for stage, stride in enumerate(STRIDES, 1):
            maps = (-(-height // stride), -(-width // stride))
            found = judge(_find(cases, MIXERS, model, stage, maps, batch))
            cells.append(f"{found.ratio:.2f}x" if isinstance(found, Verdict) else found)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines
