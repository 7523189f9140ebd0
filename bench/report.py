"""Turns the results under bench/results/ into the tables and the picture of README and docs.

    python bench/report.py            write them
    python bench/report.py --check    exit 1 where they are not what the results give

Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COMMAND = "pytest bench/ --benchmark-only --json-dir bench/results && python bench/report.py"
NOT_MEASURED = "not measured"
KEPT = "saved_bytes.json"  # written by saved_bytes.py
ACCURACY = "int8_accuracy.json"  # written by int8_accuracy.py
COREML = "coreml_accuracy.json"  # written by coreml_accuracy.py
COREML_MARKS = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
MODELS = ("xs", "t")
# The instruction sets of the CPU kernels: README's table is of the first that was measured.
SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
SPEED = ("mixer", "training", "model", "model-training")  # files of gpu.py; the others are verdicts
GPU_MODELS, GPU_BATCH = ("xs", "s", "m", "t"), 256

Document = dict[str, Any]
Case = dict[str, Any]


class ReportError(Exception):
    """The results or the README do not allow a report; the message says why."""


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


def load(folder: Path) -> list[Document]:
    """Every results file, by name.

    Raises:
        ReportError: a file is no results file, or one whose numbers are not for reporting.
    """
    documents = []
    for path in sorted(folder.glob("*-*-*.json")):  # level, model, device
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            settings, _, _ = document["settings"], document["environment"], document["cases"]
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(
                f"{path.name}: expected a results file of bench/: {error!r}"
            ) from None
        if settings["quick"]:
            raise ReportError(f"{path.name}: a --quick run tries the machinery, it is not reported")
        if settings["backend"] == "reference":
            raise ReportError(f"{path.name}: backend 'reference' is not fused, it is not reported")
        documents.append({**document, "name": path.stem})
    return documents


def load_gpu(folder: Path) -> dict[str, dict[str, Document]]:
    """The files of gpu.py: by folder (a GPU), then by part.

    Raises:
        ReportError: a file is none of gpu.py, or one whose numbers are not for reporting: of a trial,
            of the CPU, or of sources whose parity was not green.
    """
    found: dict[str, dict[str, Document]] = {}
    for path in sorted(folder.glob("*/*.json")):
        name = f"{path.parent.name}/{path.name}"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            stamp, _, cases = document["stamp"], document["settings"], document["cases"]
            quick, device = stamp["quick"], document["environment"]["device"]
            [case["id"] for case in cases]
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{name}: expected a file of bench/gpu.py: {error!r}") from None
        if quick or device == "cpu":
            raise ReportError(f"{name}: a trial of the machinery, it is not reported")
        found.setdefault(path.parent.name, {})[path.stem] = document
    for gpu, parts in found.items():
        parity = parts.get("parity", {"stamp": None, "cases": []})
        for part in SPEED:
            if part not in parts:
                continue
            stamp = parts[part]["stamp"]
            own = [c for c in parity["cases"] if c["id"].startswith(f"{stamp['backend']}-")]
            green = any(case.get("passed") for case in own) and all(
                case.get("passed") or "absent" in case for case in own
            )
            if not green or stamp != parity["stamp"]:
                raise ReportError(
                    f"{gpu}/{part}.json: no speed without green parity of its sources"
                )
    return found


def load_kept(folder: Path) -> Document | None:
    """What mixers keep for the backward; None where that was not measured."""
    return _load_one(folder / KEPT, "bench/saved_bytes.py", _kept_table)


def load_accuracy(folder: Path) -> Document | None:
    """Top-1 of exported files; None where that was not measured."""
    return _load_one(folder / ACCURACY, "bench/int8_accuracy.py", _accuracy_table)


def load_coreml(folder: Path) -> Document | None:
    """How exact Core ML packages are; None where that was not measured."""
    return _load_one(folder / COREML, "bench/coreml_accuracy.py", coreml_tables)


def _load_one(path: Path, writer: str, table: Callable[[Document], list[str]]) -> Document | None:
    """A script's document, if it is there.

    Raises:
        ReportError: no table can be made of it.
    """
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        table(document)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ReportError(f"{path.name}: expected what {writer} writes: {error!r}") from None
    return dict(document)


def judge(case: Case | None, layout: str = "") -> Verdict | str:
    """The figures of one case, or in words why there are none.

    `layout` is " channels_last" for the fused candidate of that layout. Of a whole model on the CPU,
    whose other layers are PyTorch's, it is the fastest fused candidate of both layouts, compiled or not.
    """
    if case is None:
        return NOT_MEASURED
    if "refused" in case or "error" in case:
        return "refused"
    suffix = " bf16" if case["dtype"] == "bfloat16" else ""
    ms = {r["candidate"]: 1e3 * r["median_s"] for r in case["rows"] if "median_s" in r}
    rivals = [name for name in ms if not name.startswith("fused")]
    fused, eager = "fused" + layout + suffix, "eager" + suffix
    if fused not in ms or eager not in ms:
        return NOT_MEASURED
    if case["level"] == "model" and not layout:
        fused = min((name for name in ms if name.startswith("fused")), key=lambda name: ms[name])
    best = min(rivals, key=lambda name: ms[name])
    return Verdict(ms[fused], fused, ms[best], best, ms[eager])


def by_set(documents: list[Document]) -> list[list[Document]]:
    """What README shows, for each instruction set of the CPU kernels; the best set first."""
    found: dict[str, list[Document]] = {}
    for document in documents:
        if any(c["level"] in SPEED and c["model"] in MODELS for c in document["cases"]):
            found.setdefault(document["environment"]["isa"] or "none", []).append(document)
    return [
        found[n] for n in sorted(found, key=lambda n: SETS.index(n) if n in SETS else len(SETS))
    ]


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
            eight = _find(documents, "mixer", model, stage, 8)
            title = f"mixer, {model} stage {stage}"
            if eight is not None:
                title += f" ({eight['channels']}, {eight['size']}x{eight['size']})"
            one = _find(documents, "mixer", model, stage, 1)
            step = _find(documents, "training", model, stage, 8)
            lines.append(_readme_row(title, eight, one, step))
    for model in MODELS:
        pair = (_find(documents, "model", model, None, batch) for batch in (8, 1))
        lines.append(_readme_row(f"whole rcvit_{model}", *pair, None))
    if not gpus:
        lines.append("| any GPU | " + " | ".join([NOT_MEASURED] * 6) + " |")
    lines += ["", *_caption(documents)]
    for other in others:
        lines += ["", *_ratios(other)]
    lines += ["", "![Speed-up by stage](docs/bench.svg)"]
    for parts in (gpus or {}).values():
        title = f"Mixers of stages 1 and 2 on {_gpu_facts(next(iter(parts.values())))}"
        lines += ["", f"{title}; bfloat16, batch 256, 224x224 input:", ""]
        lines += [f"- {line}" for line in goal_lines(parts[p] for p in SPEED if p in parts)]
    return "\n".join(lines)


class Goal(NamedTuple):
    """What is wanted of the mixers of stages 1 and 2; see `goal_lines`."""

    text: str
    level: str
    figure: Callable[[Case], float | None]
    least: float


def _times(baseline: str) -> Callable[[Case], float | None]:
    """How many times faster than a baseline."""

    def figure(case: Case) -> float | None:
        return _divide(_value(case, baseline), _value(case, "fused channels_last"))

    return figure


def _share(candidate: str) -> Callable[[Case], float | None]:
    """The time to read q, k, v and write the output once, over the candidate's."""

    def figure(case: Case) -> float | None:
        units = 4 * case["batch"] * case["channels"] * case["size"] ** 2
        return _divide(units * 2 / case["copy_bytes_per_s"], _value(case, candidate))

    return figure


def _less_kept(case: Case) -> float | None:
    return _divide(
        _value(case, "eager channels_last", "kept_bytes"),
        _value(case, "fused channels_last", "kept_bytes"),
    )


def _value(case: Case, candidate: str, key: str = "median_s") -> float | None:
    name = f"{candidate} bf16"
    return next((r.get(key) for r in case.get("rows", ()) if r["candidate"] == name), None)


def _divide(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


GOALS = (
    Goal("forward, share of the memory floor", "mixer", _share("fused channels_last"), 0.6),
    Goal("forward after the qkv product, share", "mixer", _share("fused mix channels_last"), 0.6),
    Goal("forward over eager channels_last", "mixer", _times("eager channels_last"), 5.0),
    Goal("forward over max-autotune", "mixer", _times("max-autotune channels_last"), 2.0),
    Goal("step over eager channels_last", "training", _times("eager channels_last"), 3.0),
    Goal("step over max-autotune", "training", _times("max-autotune channels_last"), 1.7),
    Goal("times less kept for the backward", "training", _less_kept, 4.0),
)


def goal_lines(documents: Iterable[Document]) -> list[str]:
    """For each goal the worst of the mixers of stages 1 and 2 (bf16, batch 256, 224x224 input)."""
    cases = [case for document in documents for case in document["cases"]]
    lines = []
    for goal in GOALS:
        figures = {}
        for model in GPU_MODELS:
            for stage in (1, 2):
                wanted = {"level": goal.level, "model": model, "stage": stage}
                wanted |= {"size": 112 >> stage, "batch": GPU_BATCH, "dtype": "bfloat16"}
                for case in cases:
                    if wanted.items() <= case.items() and (value := goal.figure(case)) is not None:
                        figures[f"{model} stage {stage}"] = value
        lines.append(_goal_line(goal, figures, of=2 * len(GPU_MODELS)))
    return lines


def _goal_line(goal: Goal, figures: dict[str, float], of: int) -> str:
    text = f"{goal.text} (goal {goal.least:g})"
    if not figures:
        return f"{text}: {NOT_MEASURED}"
    worst = min(figures, key=lambda name: figures[name])
    verdict = "met" if figures[worst] >= goal.least else "missed"
    if verdict == "met" and len(figures) < of:
        verdict = "met where measured"
    return f"{text}: {verdict}, {figures[worst]:.2f} at worst ({worst}; {len(figures)} of {of} measured)"


def gpu_tables(name: str, parts: dict[str, Document]) -> list[str]:
    """Everything that gpu.py found on one GPU."""
    document = next(iter(parts.values()))
    lines = ["", f"## {name}", "", f"{_gpu_facts(document)}.", ""]
    lines += [f"- {line}" for line in goal_lines(parts[p] for p in SPEED if p in parts)]
    for part in ("parity", "behaviour", "sanitizer"):
        cases = parts[part]["cases"] if part in parts else []
        passed = sum(bool(case.get("passed")) for case in cases)
        absent = sum("absent" in case for case in cases)
        text = f"{passed} of {len(cases)} passed" if cases else NOT_MEASURED
        lines.append(f"- {part}: {text}" + (f", {absent} not run" if absent else ""))
    lines += [
        "",
        "Speed-up: median of the best baseline over median of `fused channels_last`. Share: of the "
        "time that a copy of as many bytes takes as reading q, k, v and writing the output once, "
        "in a mixer's forward. Memory: what a call allocates at most.",
    ]
    for part in SPEED:
        cases = parts[part]["cases"] if part in parts else []
        lines += ["", f"### {part}", "", *(_matrix(cases, gpu=True) if cases else [NOT_MEASURED])]
    return lines


def complete_tables(
    documents: list[Document],
    kept: Document | None,
    gpus: dict[str, dict[str, Document]] | None = None,
    accuracy: Document | None = None,
) -> str:
    """bench/results/README.md."""
    lines = [
        "# Results",
        "",
        "Generated by `python bench/report.py` from the JSON files in this folder; do not edit.",
        "Milliseconds per call: median (25th to 75th percentile over the rounds).",
        "Speed-up: median of the best baseline over median of `fused` (of a whole model: of its "
        "fastest fused candidate); of exports, of "
        "`onnxruntime plain`",
        "(`torch.onnx.export` of the reference) over `onnxruntime` (`to_onnx`).",
        "",
        f"Devices without a file here: {NOT_MEASURED}.",
    ]
    for document in documents:
        lines += ["", f"## {document['name']}", "", f"{_facts(document)}."]
        for dtype in ("float32", "bfloat16"):
            cases = [c for c in document["cases"] if c["dtype"] == dtype]
            if cases:
                lines += ["", f"### {dtype}", "", *_matrix(cases)]
    for name, parts in (gpus or {}).items():
        lines += gpu_tables(name, parts)
    if kept is not None:
        lines += ["", "## Memory kept for the backward", "", *_kept_table(kept)]
    if accuracy is not None:
        lines += ["", "## Accuracy of exported files", "", *_accuracy_table(accuracy)]
    return "\n".join(lines) + "\n"


def picture(documents: list[Document]) -> str:
    """docs/bench.svg: a bar for each stage, how many times faster than its best baseline."""
    documents = next(iter(by_set(documents)), [])
    bars = [
        (f"{model}, stage {stage}", judge(_find(documents, "mixer", model, stage, 8)))
        for model in MODELS
        for stage in (1, 2, 3, 4)
    ]
    longest = max([2.0, *(v.ratio for _, v in bars if isinstance(v, Verdict))])
    left, top, row, span = 110, 76, 26, 400
    scale = span / longest
    axis = top + row * len(bars)
    # The machine, then the versions: one line would be wider than the picture.
    facts = "; ".join(_environments(documents)) or NOT_MEASURED
    machine, mark, versions = facts.partition("casvit_kernels ")
    title = "Fused mixer: speed-up over the best baseline of each stage"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{axis + 44}" '
        f'viewBox="0 0 720 {axis + 44}" role="img" aria-labelledby="title">',
        f'<title id="title">{escape(title)}</title>',
        "<style>",
        "text { font: 12px system-ui, sans-serif; fill: #1f2328 } .bar { fill: #0969da }",
        ".title { font-size: 15px; font-weight: 600 } .small { font-size: 11px; fill: #59636e }",
        "line { stroke: #59636e }",
        "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #4493f8 }",
        "  .small { fill: #9198a1 } line { stroke: #9198a1 } }",
        "</style>",
        f'<text class="title" x="12" y="24">{escape(title)}</text>',
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
        f'<line x1="{left}" x2="{left}" y1="{top}" y2="{axis}"/>',
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{top}" y2="{axis}" stroke-dasharray="3 3"/>',
        f'<text class="small" x="{one:.1f}" y="{axis + 16}" text-anchor="middle">1x</text>',
        f'<text class="small" x="{left}" y="{axis + 34}">times as fast as the fastest of eager, '
        "torch.compile (both layouts each) and ONNX Runtime</text>",
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def with_table(
    text: str, table: str, file: str = "README.md", marks: tuple[str, str] = (BEGIN, END)
) -> str:
    """`text` with what stands between its markers replaced.

    Raises:
        ReportError: the markers are not there, once each and in order.
    """
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"{file}: expected the markers {begin} and {end}, once each, in order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def outputs(root: Path) -> dict[Path, str]:
    """What each generated file should hold.

    Raises:
        ReportError: as `load` and `with_table`; or there is no README.md.
    """
    readme = root / "README.md"
    if not readme.is_file():
        raise ReportError(f"README.md: expected a file at {readme}")
    results = root / "bench" / "results"
    documents, kept, gpus = load(results), load_kept(results), load_gpu(results)
    accuracy, coreml = load_accuracy(results), load_coreml(results)
    found = {
        readme: with_table(readme.read_text(encoding="utf-8"), readme_table(documents, gpus)),
        root / "docs" / "bench.svg": picture(documents),
        results / "README.md": complete_tables(documents, kept, gpus, accuracy),
    }
    if coreml is not None:
        page = root / "docs" / "coreml.md"
        if not page.is_file():
            raise ReportError(f"docs/coreml.md: expected a file at {page}")
        tables = "\n".join(coreml_tables(coreml))
        name = "docs/coreml.md"
        found[page] = with_table(page.read_text(encoding="utf-8"), tables, name, COREML_MARKS)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    options = parser.parse_args(arguments)
    try:
        wanted = outputs(options.root)
    except ReportError as error:
        print(f"bench/report.py: {error}", file=sys.stderr)
        return 2
    stale = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if options.check:
            print(f"{path} is not what bench/results/ gives: run python bench/report.py")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if options.check and stale else 0


def _find(
    documents: list[Document],
    level: str,
    model: str,
    stage: int | None,
    batch: int,
    dtype: str = "float32",
) -> Case | None:
    wanted = {"level": level, "model": model, "stage": stage, "batch": batch, "dtype": dtype}
    for document in documents:
        for case in document["cases"]:
            if wanted.items() <= case.items():
                return dict(case)
    return None


def _ratios(documents: list[Document]) -> list[str]:
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
        f"Speed-up over the best baseline with other kernels, {'; '.join(_environments(documents))}:",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for title, level, batch, dtype in kinds:
        cells = []
        for model, stage in columns:
            own = level or ("mixer" if stage else "model")
            verdict = judge(_find(documents, own, model, stage, batch, dtype))
            cells.append(f"{verdict.ratio:.2f}x" if isinstance(verdict, Verdict) else verdict)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    gaps = _gaps([c for d in documents for c in d["cases"] if c["model"] in MODELS])
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
    lines += [f"{facts}." for facts in _environments(documents)]
    shown = [c for d in documents for c in d["cases"] if c["model"] in MODELS]
    lines += _gaps(shown)
    lines.append("Complete tables: [bench/results](bench/results/README.md). Again with:")
    lines.append(f"`{COMMAND}`")
    return lines


def _environments(documents: list[Document]) -> list[str]:
    """The machines and versions of what README shows, each once, with the days it was measured."""
    days: dict[str, set[str]] = {}
    for document in documents:
        if any(c["model"] in MODELS for c in document["cases"]):
            facts, _, day = _facts(document).rpartition(", ")
            days.setdefault(facts, set()).add(day)
    return [f"{facts}, {' and '.join(sorted(on))}" for facts, on in days.items()]


def _facts(document: Document) -> str:
    """The machine, the versions and, last, the day."""
    e = document["environment"]
    runtime = e["onnxruntime"] or "not installed"
    gpu = f"{e['gpu']}, " if "gpu" in e else ""
    return gpu + (
        f"{e['cpu']} ({e['isa']} kernels), {e['threads']} of {e['cores']} cores, "
        f"casvit_kernels {e['casvit_kernels']}, torch {e['torch']}, ONNX Runtime {runtime}, "
        f"{e['date'][:10]}"
    )


def _gpu_facts(document: Document) -> str:
    e = document["environment"]
    return (
        f"{e['gpu']} (CUDA or HIP {e['cuda']}), backend {document['stamp']['backend']}, casvit_kernels "
        f"{e['casvit_kernels']}, sources {document['stamp']['version']}, torch {e['torch']}, "
        f"triton {e['triton']}, {e['date'][:10]}"
    )


def _gaps(cases: list[Case]) -> list[str]:
    """What was not measured or refused, and why; each reason once."""
    gaps = []
    for case in cases:
        if "refused" in case:
            gaps.append(f"Refused, {_title(case)}: {case['refused']}.")
        if "error" in case:
            gaps.append(f"Refused, {case['id']}: {case['error']}.")
        for row in case.get("rows", ()):
            if "absent" in row:
                gaps.append(f"{row['candidate']} {NOT_MEASURED}: {row['absent']}.")
    return list(dict.fromkeys(gaps))


def _title(case: Case) -> str:
    stage = "whole model" if case["stage"] is None else f"stage {case['stage']}"
    shape = f"({case['batch']}, {case['channels']}, {case['size']}, {case['size']})"
    return f"{case['model']} {stage}, {shape}"


def _kept_table(kept: Document) -> list[str]:
    """Mixers down; bytes of plain PyTorch and of the fused CPU backend across."""
    lines = [
        "Bytes that autograd keeps between forward and backward of a mixer in training mode: float32, "
        f"the input counted, parameters not. By `python bench/saved_bytes.py`, torch {kept['torch']}.",
        "",
        "| mixer | plain PyTorch | fused | times less |",
        "|---|---:|---:|---:|",
    ]
    for row in kept["rows"]:
        title = f"{row['model']} stage {row['stage']}, ({', '.join(map(str, row['shape']))})"
        eager, fused = row["eager_bytes"], row["fused_bytes"]
        lines.append(f"| {title} | {eager:,} | {fused:,} | {eager / fused:.1f}x |")
    return lines


def _accuracy_table(accuracy: Document) -> list[str]:
    lines = [
        f"Top-1 on {accuracy['images']} handwritten digits that a small fused CAS-ViT was not trained "
        "on. By `python bench/int8_accuracy.py`, "
        f"torch {accuracy['torch']}, ONNX Runtime {accuracy['onnxruntime']}.",
        "",
        "| model | top-1, % | bytes |",
        "|---|---:|---:|",
    ]
    for name, top1 in accuracy["top1"].items():
        size = accuracy["bytes"].get(name)
        title = name if size is None else f"ONNX {name}"
        lines.append(f"| {title} | {top1:.2f} | {'' if size is None else f'{size:,}'} |")
    return lines


def coreml_tables(document: Document) -> list[str]:
    """The tables of docs/coreml.md: networks on photographs, then one on what it was trained for."""
    networks = [(name, rows) for name, rows in document.items() if isinstance(rows, list)]
    photographs = [(n, rows) for n, rows in networks if "right" not in rows[0]]
    head = "| | package, MB | largest error | mean error | error, rms | same top class |"
    rule = "|---|---:|---:|---:|---:|---:|"
    lines = [
        f"Networks with weights from a seed, on {photographs[0][1][0]['images']} photographs "
        f"(torch {document['torch']}, coremltools {document['coremltools']}):",
        "",
        head,
        rule,
    ]
    for name, rows in photographs:
        lines += [_coreml_row(f"{name}, {row['case']}", row) for row in rows]
    for name, rows in networks:
        if "right" not in rows[0]:
            continue
        truth = rows[0]["right_float64"]
        lines += ["", f"{name}:", "", f"{head} right (float64: {truth}) |", f"{rule}---:|"]
        lines += [
            f"{_coreml_row(row['case'], row)} {row['right']} of {row['images']} |" for row in rows
        ]
    return lines


def _coreml_row(title: str, row: Case) -> str:
    return (
        f"| {title} | {row['megabytes']:.2f} | {row['max_error']:.2g} | {row['mean_error']:.2g} | "
        f"{100 * row['relative_rms']:.2g} % | {row['same_top_class']} of {row['images']} |"
    )


def _matrix(cases: list[Case], gpu: bool = False) -> list[str]:
    """Cases down, candidates across; on a GPU memory and share beside the milliseconds."""
    measured = [case for case in cases if "error" not in case]
    names = list(dict.fromkeys(row["candidate"] for c in cases for row in c.get("rows", ())))
    lines = [
        "| case | " + " | ".join([*names, "speed-up"]) + " |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for case in measured:
        rows = {row["candidate"]: row for row in case.get("rows", ())}
        cells = [_cell(rows.get(name)) + _extra(case, name, gpu) for name in names]
        cells.append(_speed_up(case, rows, " channels_last" if gpu else ""))
        lines.append(f"| {_title(case)} | {' | '.join(cells)} |")
    for gap in _gaps(cases):
        lines += ["", gap]
    return lines


def _speed_up(case: Case, rows: dict[str, Any], layout: str) -> str:
    if case["level"] == "export" and "refused" not in case:
        pair = [rows.get(name, {}).get("median_s") for name in ("onnxruntime plain", "onnxruntime")]
        return f"{pair[0] / pair[1]:.2f}x" if all(pair) else NOT_MEASURED
    verdict = judge(case, layout)
    return f"{verdict.ratio:.2f}x" if isinstance(verdict, Verdict) else verdict


def _extra(case: Case, candidate: str, gpu: bool) -> str:
    """Memory and share of a candidate, where they were measured."""
    name = candidate.removesuffix(" bf16")
    peak = _value(case, name, "peak_bytes") if gpu else None
    share = _share(name)(case) if gpu and case["level"] == "mixer" else None
    text = f", {peak / 2**20:,.0f} MiB" if peak is not None else ""
    return text + (f", share {share:.2f}" if share is not None else "")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "absent" in row:
        return NOT_MEASURED
    median, p25, p75 = (1e3 * row[key] for key in ("median_s", "p25_s", "p75_s"))
    return f"{median:.3g} ({p25:.3g} to {p75:.3g})"


if __name__ == "__main__":
    sys.exit(main())
