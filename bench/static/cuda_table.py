"""docs/cuda_kernels.md, from the numbers of cuda_kernels.py alone: goals, launches, phases, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cuda_counts import Phase, blocks_together
from cuda_work import CHUNK, KERNELS, LANES, WARPS, Plan, Shape

JUDGED = "sm_90a"  # where goals are judged: the H100
MOST_INSTRUCTIONS = 60.0  # of gates + combine at the first stage
MOST_MAPS = 6.3  # units that gates + combine ask for
SHARES = (0.6, 0.6, 0.4, 0.4)  # of the least time there could be, by stage
# The time model of an H100; the first three are assumptions, none is measured.
BANDWIDTH = 3.0e12  # bytes a second
CLOCK = 1.7e9
ISSUED = 0.8 * 4  # warp-instructions of a cycle and multiprocessor
MMA_CYCLES = 8 / 4  # of an mma.sync on a multiprocessor with four tensor cores
UNITS = {"gates": 2, "combine": 4}  # maps to and from device memory; 4 would do: q and k once
LEAST_UNITS = 4
TRITON_INSTRUCTIONS = 170

Row = dict[str, Any]


def total(row: Row) -> float:
    return float(sum(row["loops"].values()) + row["straight"])


def seconds(row: Row, shape: Shape, multiprocessors: int) -> dict[str, float]:
    """What each of the three takes alone; the largest is what a kernel cannot be faster than."""
    outputs = shape.unit / 2
    cycles = multiprocessors * CLOCK
    return {
        "memory": UNITS[row["kernel"]] * shape.unit / BANDWIDTH,
        "instructions": total(row) * outputs / LANES / (ISSUED * cycles),
        "mma": row["mma"] * outputs / 128 * MMA_CYCLES / cycles,
    }


def barriers_in_sweeps(row: Row) -> int:
    phases = (Phase(*p[:4], tuple(p[4]), *p[5:]) for p in row["phases"])
    return sum(p.barriers for p in phases if p.name.startswith(("sweep", "pooled")))


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


class Numbers:
    """The rows of the JSON file by target, type, stage and kernel."""

    def __init__(
        self,
        document: Mapping[str, Any],
        targets: Mapping[str, Any],
        stages: Sequence[tuple[int, int]],
        batch: int,
    ) -> None:
        self.rows: list[Row] = document["rows"]
        self.targets = targets
        self.shapes = [Shape(batch, c, edge, edge) for c, edge in stages]

    def row(self, target: str, channels: int, kernel: str, dtype: str = "bf16") -> Row:
        key = (target, dtype, channels, kernel)
        return next(
            r for r in self.rows if (r["target"], r["dtype"], r["channels"], r["kernel"]) == key
        )

    def mixing(self, target: str, shape: Shape) -> tuple[Row, Row]:
        """gates and combine: what inference runs."""
        return self.row(target, shape.channels, "gates"), self.row(
            target, shape.channels, "combine"
        )

    def share(self, shape: Shape) -> float:
        """Of the least time that the predicted one is."""
        multiprocessors = self.targets[JUDGED].multiprocessors
        took = sum(
            max(seconds(r, shape, multiprocessors).values()) for r in self.mixing(JUDGED, shape)
        )
        return LEAST_UNITS * shape.unit / BANDWIDTH / took

    def goals(self) -> list[tuple[str, str, str, bool]]:
        """What is asked, where, what it is, and whether that meets it."""
        found = []
        first = self.shapes[0]
        n = sum(total(r) for r in self.mixing(JUDGED, first))
        asked = f"at most {MOST_INSTRUCTIONS:.0f} instructions an output"
        found.append((asked, f"C = {first.channels}", f"{n:.1f}", n <= MOST_INSTRUCTIONS))
        for shape in self.shapes:
            units = sum(r["maps"] for r in self.mixing(JUDGED, shape))
            where = f"C = {shape.channels}"
            asked = f"at most {MOST_MAPS} units of maps asked for"
            found.append((asked, where, f"{units:.2f}", units <= MOST_MAPS))
        for shape, least in zip(self.shapes, SHARES, strict=True):
            share = self.share(shape)
            asked = f"at least {least} of the bandwidth, predicted"
            found.append((asked, f"C = {shape.channels}", f"{share:.3f}", share >= least))
        spilled = sum(r["spilled"] for r in self.rows)
        found.append(("no spills", "all rows", str(spilled), spilled == 0))
        barriers = sum(barriers_in_sweeps(r) for r in self.rows)
        found.append(("no barrier in a loop with mma", "all rows", str(barriers), barriers == 0))
        return found


INTRO = """\
Nothing here was timed: no GPU has run these kernels yet. The numbers are read from the machine code
that nvcc makes and from how each map is cut into blocks; the predicted times at the end are such
numbers over assumed rates. Batch {batch}, the four stages of RCViT-xs at 224 x 224 input, channels_last.

Instructions are of a thread, executed, for each pixel and channel of the output. "Loops" is what the
bodies of loops cost, "rest" what lies in no loop, each side of its branches counted, so at most. mma:
tensor-core instructions of a warp for 128 of these outputs. A unit is B C H W values of 16 bits. "Maps"
are units of q, k, v and the result that threads ask for, halos included; "others" what they ask for of
weights, spatial gates and sums, nearly all of it served by caches. How it is counted is written at the
head of `bench/static/cuda_kernels.py`."""


def table(
    document: Mapping[str, Any],
    triton: Mapping[str, Any],
    targets: Mapping[str, Any],
    stages: Sequence[tuple[int, int]],
    batch: int,
) -> str:
    numbers = Numbers(document, targets, stages, batch)
    judged = targets[JUDGED].name
    lines = [
        f"# CUDA kernels, as compiled by nvcc {document['nvcc']}",
        "",
        "Generated by `python bench/static/cuda_kernels.py`; do not edit.",
        "",
        *INTRO.format(batch=batch).splitlines(),
        "",
        "## Goals",
        "",
        f"Of gates and combine together, on {JUDGED} ({judged}), bf16.",
        "",
        "| goal | where | is | |",
        "|---|---|---:|---|",
        *(
            f"| {goal} | {where} | {n} | {_verdict(met)} |"
            for goal, where, n, met in numbers.goals()
        ),
    ]
    for name, target in targets.items():
        lines += ["", f"## {name} ({target.name})", "", *_launches(numbers, name, target)]
    lines += ["", f"## Where they are spent, on {JUDGED}", "", *_phases(numbers)]
    lines += ["", f"## Predicted time, {judged}", "", *_times(numbers)]
    lines += ["", "## Triton's kernels beside them", "", *_triton(triton, numbers)]
    return "\n".join(lines) + "\n"


def _launches(numbers: Numbers, name: str, target: Any) -> list[str]:
    lines = [
        "| C | kernel | dtype | a block's cut | shared | registers | blocks together | loops | rest | "
        "sum | mma | barriers in loops | maps | others |",
        "|---:|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in numbers.rows:
        if row["target"] != name:
            continue
        plan = Plan(*row["plan"])
        cut = (
            f"{plan.images} x {plan.own_rows} x {2 * plan.pairs} x {plan.chunks * CHUNK}"
            f"{', halo' if plan.halo else ''}"
        )
        spilled = f" +{row['spilled']}" if row["spilled"] else ""
        together = blocks_together(row["registers"], plan.shared, target.shared, target.threads)
        lines.append(
            f"| {row['channels']} | {row['kernel']} | {row['dtype']} | {cut} | {plan.shared} | "
            f"{row['registers']}{spilled} | {together} | {sum(row['loops'].values()):.1f} | "
            f"{row['straight']:.1f} | {total(row):.1f} | {row['mma']:.1f} | "
            f"{sum(p[6] for p in row['phases'])} | {row['maps']:.2f} | {row['rest']:.2f} |"
        )
    sums = []
    for shape in numbers.shapes:
        pair = numbers.mixing(name, shape)
        sums.append(
            f"{sum(map(total, pair)):.1f} instructions and {sum(r['maps'] for r in pair):.2f} units "
            f"at C = {shape.channels}"
        )
    return [
        f"Cut: images x rows x columns x channels, by {WARPS * LANES} threads. gates + combine: "
        + ", ".join(sums)
        + ".",
        "",
        *lines,
    ]


def _phases(numbers: Numbers) -> list[str]:
    lines = [
        "Instructions an output by phase, and in brackets of one piece of work: a warp's copy, load or",
        "store of 32 granules of four channels, an mma, 32 pixels' sigmoid, 32 products. What a piece's",
        "share does not explain are loops around it: divisions, pointers, remainders.",
        "",
        "| kernel | phase | " + " | ".join(f"C = {s.channels}" for s in numbers.shapes) + " |",
        "|---|---|" + "---:|" * len(numbers.shapes),
    ]
    for kernel in KERNELS:
        rows = [numbers.row(JUDGED, s.channels, kernel) for s in numbers.shapes]
        for name in rows[0]["loops"]:
            cells = []
            for row in rows:
                _, own, items, *_ = next(p for p in row["phases"] if p[0] == name)
                cells.append(f"{row['loops'][name]:.1f} ({own / items:.1f})")
            lines.append(f"| {kernel} | {name} | " + " | ".join(cells) + " |")
        lines.append(
            f"| {kernel} | no loop | " + " | ".join(f"{r['straight']:.1f}" for r in rows) + " |"
        )
    return lines


def _times(numbers: Numbers) -> list[str]:
    lines = [
        f"Each kernel takes the longest of three: device memory at {BANDWIDTH / 1e12:.1f} TB/s (gates 2",
        "units, combine 4: halos and all else are taken to come from L2); instructions at",
        f"{ISSUED:.1f} of a warp each cycle and multiprocessor (80 % of what can be issued) at",
        f"{CLOCK / 1e9:.1f} GHz; an mma in {MMA_CYCLES:.0f} cycles of a multiprocessor. These rates are",
        "assumed, not measured; launches, the last blocks of a grid and waiting at barriers cost",
        "nothing here. The least: 4 units at the same bandwidth. Microseconds.",
        "",
        "| C | kernel | memory | instructions | mma | predicted | both | least | share |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape in numbers.shapes:
        took = 0.0
        for row in numbers.mixing(JUDGED, shape):
            parts = seconds(row, shape, numbers.targets[JUDGED].multiprocessors)
            longest = max(parts.values())
            took += longest
            cells = [f"{1e6 * t:.1f}" for t in (*parts.values(), longest)]
            if row["kernel"] == "combine":
                least = LEAST_UNITS * shape.unit / BANDWIDTH
                cells += [f"{1e6 * took:.1f}", f"{1e6 * least:.1f}", f"{least / took:.3f}"]
            else:
                cells += [""] * 3
            lines.append(f"| {shape.channels} | {row['kernel']} | " + " | ".join(cells) + " |")
    return lines


def _triton(triton: Mapping[str, Any], numbers: Numbers) -> list[str]:
    lines = [
        f"From [triton_kernels.md](triton_kernels.md) (Triton {triton['triton']}), channels_last, bf16.",
        "Barriers and shuffles stand in the text and run in loops over channels or taps. Nobody counted",
        f"the instructions that it executes: about {TRITON_INSTRUCTIONS} an output for gates + combine",
        "is an estimate made by hand.",
        "",
        "| target | kernel | C | registers | shared | barriers in the text | shuffles |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    channels = {s.channels for s in numbers.shapes}
    for r in sorted(triton["rows"], key=lambda r: (r[4], r[0], r[1])):
        (
            kernel,
            c,
            layout,
            dtype,
            target,
            registers,
            spilled,
            shared,
            _,
            _,
            barriers,
            shuffles,
            _,
        ) = r
        if (layout, dtype) != ("channels_last", "bf16") or kernel not in KERNELS:
            continue
        if c in channels and target.startswith("sm_"):
            moved = f"{registers} +{spilled}" if spilled else registers
            lines.append(
                f"| {target} | {kernel} | {c} | {moved} | {shared} | {barriers} | {shuffles} |"
            )
    return lines
