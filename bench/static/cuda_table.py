"""docs/cuda_kernels.md, from the numbers of cuda_kernels.py alone: goals, launches, phases, times."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cuda_counts import KERNELS, Phase, blocks_together
from cuda_work import CHUNK, LANES, WARPS, Plan, Shape

from bench.report.gpu_order import TRITON_INSTRUCTIONS

JUDGED = "sm_90a"  # where goals are judged: the H100
# The time model of an H100; the first three are assumptions, none is measured.
BANDWIDTH = 3.0e12  # bytes a second
CLOCK = 1.7e9
ISSUED = 0.8 * 4  # warp-instructions of a cycle and multiprocessor
MMA_CYCLES = 8 / 4  # of an mma.sync on a multiprocessor with four tensor cores

Row = dict[str, Any]


class Pass(NamedTuple):
    """Kernels that run together, and what is asked of them."""

    name: str
    kernels: tuple[str, ...]
    least_units: int  # of maps, once each
    most_instructions: float | None  # an output, at the first stage
    most_maps: float  # units that they ask for
    shares: tuple[float, ...]  # of the least time there could be, by stage


PASSES = (
    # 4 units: q and k once.
    Pass("gates + combine", ("gates", "combine"), 4, 60.0, 6.3, (0.6, 0.6, 0.4, 0.4)),
    Pass("one launch", ("single_pass",), 4, None, 4.2, (0.75,)),
    Pass(
        "B1 + B2 + B3",
        ("backward_combine", "backward_gate", "backward_depthwise"),
        13,
        150.0,
        14.0,
        (0.55, 0.55),
    ),
)


def total(row: Row) -> float:
    return float(sum(row["loops"].values()) + row["straight"])


def seconds(row: Row, shape: Shape, multiprocessors: int) -> dict[str, float]:
    """What each of the three takes alone; the largest is what a kernel cannot be faster than."""
    outputs = shape.unit / 2
    cycles = multiprocessors * CLOCK
    return {
        "memory": KERNELS[row["kernel"]].units * shape.unit / BANDWIDTH,
        "instructions": total(row) * outputs / LANES / (ISSUED * cycles),
        "mma": row["mma"] * outputs / 128 * MMA_CYCLES / cycles,
    }


def barriers_with_mma(row: Row) -> int:
    phases = (Phase(*p[:4], tuple(p[4]), *p[5:]) for p in row["phases"])
    return sum(p.barriers for p in phases if p.mma)


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

    def together(self, of: Pass, target: str, shape: Shape) -> list[Row]:
        """A row for each kernel of a pass; none where one does not fit."""
        there = {(r["target"], r["channels"], r["kernel"]) for r in self.rows}
        if not all((target, shape.channels, kernel) in there for kernel in of.kernels):
            return []
        return [self.row(target, shape.channels, kernel) for kernel in of.kernels]

    def seconds(self, of: Pass, shape: Shape) -> tuple[float, float]:
        """The predicted time, and the least."""
        multiprocessors = self.targets[JUDGED].multiprocessors
        rows = self.together(of, JUDGED, shape)
        took = sum(max(seconds(r, shape, multiprocessors).values()) for r in rows)
        return took, of.least_units * shape.unit / BANDWIDTH

    def goals(self) -> list[tuple[str, str, str, bool]]:
        """What is asked, where, what it is, and whether that meets it."""
        found = []
        for of in PASSES:
            first = self.shapes[0]
            n = sum(total(r) for r in self.together(of, JUDGED, first))
            if of.most_instructions is not None:
                asked = f"{of.name}: at most {of.most_instructions:.0f} instructions an output"
                where = f"C = {first.channels}"
                found.append((asked, where, f"{n:.1f}", n <= of.most_instructions))
            for shape in self.shapes:
                units = sum(r["maps"] for r in self.together(of, JUDGED, shape))
                asked = f"{of.name}: at most {of.most_maps:g} units of maps asked for"
                where = f"C = {shape.channels}"
                found.append((asked, where, f"{units:.2f}", units <= of.most_maps))
            for shape, share in zip(self.shapes, of.shares, strict=False):
                took, least = self.seconds(of, shape)
                asked = f"{of.name}: at least {share} of the bandwidth, predicted"
                where = f"C = {shape.channels}"
                found.append((asked, where, f"{least / took:.3f}", least / took >= share))
        spilled = sum(r["spilled"] for r in self.rows)
        found.append(("no spills", "all rows", str(spilled), spilled == 0))
        barriers = sum(barriers_with_mma(r) for r in self.rows)
        found.append(("no barrier in a loop with mma", "all rows", str(barriers), barriers == 0))
        return found


INTRO = """\
Nothing here was timed: no GPU has run these kernels yet. The numbers are read from the machine code
that nvcc makes and from how each map is cut into blocks; the predicted times at the end are such
numbers over assumed rates. Batch {batch}, the four stages of RCViT-xs at 224 x 224 input, channels_last.

Instructions are of a thread, executed, for each pixel and channel of the output. "Loops" is what the
bodies of loops cost, "rest" what lies in no loop, each side of its branches counted, so at most. mma:
tensor-core instructions of a warp for 128 of these outputs. A unit is B C H W values of 16 bits. "Maps"
are units of q, k, v, the result and gradients of these that threads ask for, halos included; "others"
what they ask for of weights, spatial gates and sums, nearly all of it served by caches. How it is
counted is written at the head of `bench/static/cuda_kernels.py`."""


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
        f"On {JUDGED} ({judged}), bf16. gates + combine are the forward of inference, or one launch,",
        "single_pass, is; B1 + B2 + B3 are the backward: backward_combine, backward_gate and",
        "backward_depthwise. Single_pass has a barrier beside its mma by design: where groups of warps",
        "share the channels of a tile, they take turns to add up its logits, and the loop over turns,",
        "with the barrier, lies in the loop over tiles behind the loop with the mma.",
        "",
        "| goal | where | is | |",
        "|---|---|---:|---|",
        *(
            f"| {goal} | {where} | {n} | {_verdict(met)} |"
            for goal, where, n, met in numbers.goals()
        ),
    ]
    lines += ["", "## One launch or two", "", *_choices(numbers)]
    for name, target in targets.items():
        lines += ["", f"## {name} ({target.name})", "", *_launches(numbers, name, target)]
    lines += ["", f"## Where they are spent, on {JUDGED}", "", *_phases(numbers)]
    lines += ["", f"## Predicted time, {judged}", "", *_times(numbers)]
    lines += ["", "## Triton's kernels beside them", "", *_triton(triton, numbers)]
    return "\n".join(lines) + "\n"


def _choices(numbers: Numbers) -> list[str]:
    two, one = PASSES[:2]
    lines = [
        "What the planner takes after the qkv product, by its own estimate of either",
        f"(csrc/cuda/plan.h), and in brackets instructions an output: of {two.name}, of one launch.",
        "",
        "| target | " + " | ".join(f"C = {s.channels}" for s in numbers.shapes) + " |",
        "|---|" + "---|" * len(numbers.shapes),
    ]
    for target in numbers.targets:
        cells = []
        for shape in numbers.shapes:
            both, single = (numbers.together(of, target, shape) for of in (two, one))
            if single:
                taken = "one launch" if single[0]["chosen"] else two.name
                n = f"{sum(map(total, both)):.1f}, {sum(map(total, single)):.1f}"
            else:
                taken, n = two.name, f"{sum(map(total, both)):.1f}, does not fit"
            cells.append(f"{taken} ({n})")
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return lines


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
    for of in PASSES:
        each = []
        for shape in numbers.shapes:
            rows = numbers.together(of, name, shape)
            n = (
                f"{sum(map(total, rows)):.1f} instructions and {sum(r['maps'] for r in rows):.2f} units"
                if rows
                else "does not fit"
            )
            each.append(f"{n} at C = {shape.channels}")
        sums.append(f"{of.name}: {', '.join(each)}.")
    return [
        f"Cut: images x rows x columns x channels, by {WARPS * LANES} threads.",
        "",
        *(f"- {line}" for line in sums),
        "",
        *lines,
    ]


def _phases(numbers: Numbers) -> list[str]:
    lines = [
        "Instructions an output by phase, and in brackets of one piece of work: a warp's copy, load or",
        "store of 32 granules of four channels, an mma, 32 pixels' sigmoid, 32 products or sums. What a",
        "piece's share does not explain are loops around it: divisions, pointers, remainders.",
        "",
        "| kernel | phase | " + " | ".join(f"C = {s.channels}" for s in numbers.shapes) + " |",
        "|---|---|" + "---:|" * len(numbers.shapes),
    ]
    for kernel in KERNELS:
        rows = [numbers.row(JUDGED, s.channels, kernel) for s in numbers.shapes]
        for name in dict.fromkeys(name for row in rows for name in row["loops"]):
            cells = []
            for row in rows:
                found = [
                    p for p in row["phases"] if p[0] == name
                ]  # zeros: not where bands have halos
                cells += [f"{row['loops'][name]:.1f} ({own / n:.1f})" for _, own, n, *_ in found]
                cells += [""] * (not found)
            lines.append(f"| {kernel} | {name} | " + " | ".join(cells) + " |")
        lines.append(
            f"| {kernel} | no loop | " + " | ".join(f"{r['straight']:.1f}" for r in rows) + " |"
        )
    return lines


def _times(numbers: Numbers) -> list[str]:
    units = (f"{kernel} {KERNELS[kernel].units}" for of in PASSES for kernel in of.kernels)
    least = (f"{of.least_units} units for {of.name}" for of in PASSES)
    lines = [
        f"Each kernel takes the longest of three: device memory at {BANDWIDTH / 1e12:.1f} TB/s (units:",
        f"{', '.join(units)};",
        "halos and what is read again are taken to come from L2); instructions at",
        f"{ISSUED:.1f} of a warp each cycle and multiprocessor (80 % of what can be issued) at",
        f"{CLOCK / 1e9:.1f} GHz; an mma in {MMA_CYCLES:.0f} cycles of a multiprocessor. These rates are",
        "assumed, not measured; launches, the last blocks of a grid and waiting at barriers cost",
        "nothing here. The least, at the same bandwidth:",
        f"{', '.join(least)}.",
        "Microseconds.",
        "",
        "| C | kernel | memory | instructions | mma | predicted | together | least | share |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    multiprocessors = numbers.targets[JUDGED].multiprocessors
    for of, shape in itertools.product(PASSES, numbers.shapes):
        for row in numbers.together(of, JUDGED, shape):
            parts = seconds(row, shape, multiprocessors)
            cells = [f"{1e6 * t:.1f}" for t in (*parts.values(), max(parts.values()))]
            if row["kernel"] == of.kernels[-1]:
                took, floor = numbers.seconds(of, shape)
                cells += [f"{1e6 * took:.1f}", f"{1e6 * floor:.1f}", f"{floor / took:.3f}"]
            else:
                cells += [""] * 3
            lines.append(f"| {shape.channels} | {row['kernel']} | " + " | ".join(cells) + " |")
    return lines


def _triton(triton: Mapping[str, Any], numbers: Numbers) -> list[str]:
    latest = max((r[0] for r in triton["rows"]), key=lambda v: tuple(map(int, v.split("."))))
    lines = [
        f"From [triton_kernels.md](triton_kernels.md) (Triton {latest}), channels_last, bf16.",
        "Barriers and shuffles stand in the text and run in loops over channels or taps. Nobody counted",
        f"the instructions that it executes: about {TRITON_INSTRUCTIONS} an output for gates + combine",
        "is an estimate made by hand.",
        "",
        "| target | kernel | C | registers | shared | barriers in the text | shuffles |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    channels = {s.channels for s in numbers.shapes}
    for r in sorted(triton["rows"], key=lambda r: (r[5], r[1], r[2])):
        (
            version,
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
        if (version, layout, dtype) != (latest, "channels_last", "bf16") or kernel not in KERNELS:
            continue
        if c in channels and target.startswith("sm_"):
            moved = f"{registers} +{spilled}" if spilled else registers
            lines.append(
                f"| {target} | {kernel} | {c} | {moved} | {shared} | {barriers} | {shuffles} |"
            )
    return lines
