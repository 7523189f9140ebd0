"""Whole networks on the CPU: the tables of README, docs/performance.md and bench/results/README.md."""

from __future__ import annotations

from bench.report.captions import machine, missing
from bench.report.documents import NOT_MEASURED, SETS, Case, Document, find
from bench.report.goals import network_goal_lines, network_value, share_of_peak
from bench.report.verdict import Verdict, judge

LEVEL = "network"
NETWORKS, BATCHES = ("xs", "s", "m", "t"), (1, 8)
OURS = "fused network"
INTRODUCTION = """\
## Whole networks in one call

`fuse_network`, 224x224 input, photographs, untrained weights. Each candidate has a process of its own,
for the thread pools of PyTorch, ONNX Runtime and OpenVINO spin after a call; they take turns, all with
as many threads, started anew as often as is said with the machine. ONNX Runtime and OpenVINO read
the file that `to_onnx` writes; OpenVINO for latency, in fp32 with `INFERENCE_PRECISION_HINT=f32`, in
bf16 as it comes.
`torch.compile`: the best of both layouts and of freezing. Fused mixers: the best of `fuse`, compiled or
not. Columns with a rival's name say how many times as fast as that the network in one call is; below 1x
the rival is faster. Error: largest difference to float64, in brackets eager PyTorch's (fp32) or
OpenVINO's (bf16). Share of peak: of the multiply-adds a second that the CPU reached in a loop of nothing
else, between the rounds."""
# Column and the candidates that it is the best of.
RIVALS = {
    "OpenVINO": ("openvino",),
    "ONNX Runtime": ("onnxruntime",),
    "`torch.compile`": ("compile", "compile channels_last", "compile frozen"),
    "eager": ("eager", "eager channels_last"),
    "fused mixers": ("fused", "fused channels_last", "fused compile channels_last"),
}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
COMPARED = {"float32": "eager", "bfloat16": "openvino"}  # whose error stands beside ours
README_ROWS = (("xs", 1), ("xs", 8), ("t", 1), ("t", 8))


def by_set(documents: list[Document]) -> dict[str, list[Document]]:
    """Results of whole networks, by the instruction set of the kernels, the best first."""
    found: dict[str, list[Document]] = {}
    for document in documents:
        if any(case["level"] == LEVEL for case in document["cases"]):
            found.setdefault(document["environment"]["isa"] or "none", []).append(document)
    return dict(
        sorted(found.items(), key=lambda item: (*SETS, item[0]).index(item[0]))  # unknown: last
    )


def overview(documents: list[Document]) -> list[str]:
    """The section of docs/performance.md."""
    lines = [INTRODUCTION]
    sets = by_set(documents)
    if not sets:
        lines += ["", f"Any CPU: {NOT_MEASURED}."]
    for isa, of_set in sets.items():
        lines += ["", f"### {isa}", "", *_machines(of_set)]
        for dtype, precision in PRECISIONS.items():
            rivals = {n: c for n, c in RIVALS.items() if dtype == "float32" or n != "ONNX Runtime"}
            columns = [
                precision, "ms", "best rival, ms", "speed-up", *rivals, "error", "same top-1",
                "share of peak",
            ]  # fmt: skip
            if not any(c["dtype"] == dtype for document in of_set for c in document["cases"]):
                lines += ["", f"{precision}: {NOT_MEASURED}."]
                continue
            lines += ["", f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
            for model in NETWORKS:
                for batch in BATCHES:
                    case = find(of_set, LEVEL, model, None, batch, dtype)
                    cells = _cells(case, rivals)
                    lines.append(f"| rcvit_{model}, batch {batch} | {' | '.join(cells)} |")
        lines += ["", *(f"- {line}" for line in network_goal_lines(of_set, isa))]
        gaps = missing([case for document in of_set for case in document["cases"]])
        lines += ["", *gaps] if gaps else []
    return lines


def _machines(documents: list[Document]) -> list[str]:
    return list(dict.fromkeys(f"{machine(d)}. {_starts(d)}." for d in documents))


def _starts(document: Document) -> str:
    count = document["settings"]["starts"]
    return f"Each process was started {'once' if count == 1 else f'{count} times'}"


def _cells(case: Case | None, rivals: dict[str, tuple[str, ...]]) -> list[str]:
    found = judge(case)
    if case is None or not isinstance(found, Verdict):
        return [str(found)] * (6 + len(rivals))
    best = found.best_name.removesuffix(" bf16")
    cells = [f"{found.fused:.3g}", f"{found.best:.3g} ({best})", f"**{found.ratio:.2f}x**"]
    for names in rivals.values():
        medians = [network_value(case, name) for name in names]
        seconds = min((m for m in medians if m is not None), default=None)
        cells.append(NOT_MEASURED if seconds is None else f"{1e3 * seconds / found.fused:.2f}x")
    other = network_value(case, COMPARED[case["dtype"]], "max_error")
    own = network_value(case, OURS, "max_error")
    compared = NOT_MEASURED if other is None else f"{other:.2g}"
    return [*cells, f"{own:.2g} ({compared})", _top1(case, OURS), _share(case, OURS)]


def _top1(case: Case, candidate: str) -> str:
    return f"{network_value(case, candidate, 'same_top1')} of {case['images']}"


def _share(case: Case, candidate: str) -> str:
    share = share_of_peak(case, candidate)
    return NOT_MEASURED if share is None else f"{share:.2f}"


def every_candidate(document: Document) -> list[str]:
    """The tables of bench/results/README.md: a row for each candidate of each case."""
    lines = []
    for case in document["cases"]:
        title = f"{case['model']}, batch {case['batch']}, {PRECISIONS[case['dtype']]}"
        lines += ["", f"### {title}, {case['size']}x{case['size']}", ""]
        rows = sorted((r for r in case.get("rows", ()) if "median_s" in r), key=_median)
        if rows:
            peak = case.get("peak_macs_per_s")
            reached = NOT_MEASURED if peak is None else f"{peak / 1e9:.0f} GMAC/s"
            lines += [
                f"{case['macs'] / 1e9:.3f} GMAC an image; peak of the CPU: {reached}.",
                "",
                "| candidate | ms | to the best rival | error | same top-1 | share of peak |",
                "|---|---:|---:|---:|---:|---:|",
            ]
        best = min((_median(r) for r in rows if not r["candidate"].startswith("fused")), default=0)
        for row in rows:
            median, p25, p75 = (1e3 * row[key] for key in ("median_s", "p25_s", "p75_s"))
            name = row["candidate"].removesuffix(" bf16")
            precision = f" ({row['precision']})" if "precision" in row else ""
            lines.append(
                f"| {name}{precision} | {median:.3g} ({p25:.3g} to {p75:.3g}) | "
                f"{best / _median(row):.2f}x | {row['max_error']:.2g} | {_top1(case, name)} | "
                f"{_share(case, name)} |"
            )
        for gap in missing([case]):
            lines += ["", gap]
    return lines


def _median(row: Case) -> float:
    return float(row["median_s"])


def readme_lines(documents: list[Document]) -> list[str]:
    """The second table of README.md: of the best instruction set that was measured."""
    of_set = next(iter(by_set(documents).values()), [])
    lines = [
        "| whole network in one call, 224x224 input | fp32, ms | best rival, ms | speed-up | bf16, ms | "
        "best rival, ms | speed-up |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model, batch in README_ROWS:
        cells = []
        for dtype in PRECISIONS:
            found = judge(find(of_set, LEVEL, model, None, batch, dtype))
            if isinstance(found, Verdict):
                best = f"{found.best:.3g} ({found.best_name.removesuffix(' bf16')})"
                cells += [f"{found.fused:.3g}", best, f"**{found.ratio:.2f}x**"]
            else:
                cells += [found] * 3
        lines.append(f"| rcvit_{model}, batch {batch} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "`fuse_network`; each candidate in a process of its own, in turn. Best rival: of eager, "
        "`torch.compile` (both layouts, and freezing), ONNX Runtime and OpenVINO, in the same "
        "precision.",
        *_machines(of_set),
    ]
