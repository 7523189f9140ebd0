"""Which cases each part consists of, and in which order they run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from bench.harness.case import GPU_CHOICE, Case, Choice
from bench.harness.case import names as case_names
from bench.levels import test_mixer, test_model, test_training_speed
from bench.report import gate
from casvit_kernels import backends, testing
from casvit_kernels.backends import Problem, get
from casvit_kernels.models import CONFIGS

SPEED = ("mixer", "training", "model", "model-training")
GATED = (*SPEED, "counters")  # not without parity
TOOLS = ("memcheck", "racecheck")
BEHAVIOUR = "tests/test_gpu.py"  # streams, devices, graphs, compilers


class Step(NamedTuple):
    """What is left of a part up to a rank."""

    part: str
    rank: int
    seconds: float = (
        60.0  # after which no candidate begins; what is then left comes after all steps
    )


# By worth: the machine may be there for a few minutes only. Rank 0 is what decides what to do next.
SCHEDULE = (
    Step("parity", 0, 75),  # smoke: every kernel, dtype, layout and mode; then the mixers of rank 0
    Step("mixer", 0, 90),
    Step("counters", 0),
    Step("training", 0),
    Step("model", 0, 150),
    Step("mixer", 1, 90),  # the compiled baselines
    Step("training", 1, 90),
    Step("parity", 1, 150),
    Step("behaviour", 1, 120),
    Step("sanitizer", 1, 120),
    Step("model", 1, 150),
    Step("model-training", 1, 150),
    *(Step(part, rank, 150) for rank in (2, 3, 4) for part in ("parity", *SPEED)),
)
PARTS = tuple(dict.fromkeys(step.part for step in SCHEDULE))
LEVELS: dict[str, Any] = {
    "mixer": test_mixer,
    "training": test_training_speed,
    "model": test_model,
    "model-training": test_model,
}
# They end the keys of what of a case is measured apart.
COMPILED, AUTOTUNED, CONTIGUOUS = "-compiled", "-max-autotune", "-contiguous"
ANCHORS = ("eager", "eager channels_last", "fused channels_last")  # in every item, to compare with
# What of a mixer is measured first, at rank 0.
FIRST = {
    "mixer": (*ANCHORS, "fused mix channels_last", "fused graph channels_last"),
    "training": ANCHORS,
}
COMPILERS = {"compile", "max-autotune"}
# The first is there in every combination, the second's channels fill no block of 8.
SMOKE_SHAPES, SMOKE_CASES = ((2, 48, 13, 9), (5, 220, 7, 7), (2, 33, 7, 7)), 20


class Item(NamedTuple):
    """One case of a part; rank 0 is run first."""

    key: str
    rank: int
    case: Any
    names: tuple[str, ...] = ()  # candidates


def items(part: str, options: argparse.Namespace) -> list[Item]:
    if part == "parity":
        return parity_items(options)
    if part == "behaviour":
        return [Item(BEHAVIOUR, 1, BEHAVIOUR)]
    if part == "sanitizer":
        return [Item(tool, 1, tool) for tool in TOOLS]
    choice = Choice(("xs",), (1,), (224,), True, True) if options.quick else GPU_CHOICE
    if part == "counters":
        cases = [
            c for c in test_mixer.cases(choice) if c.stage in (1, 4) and rank(c, options.quick) == 0
        ]
        return [Item(c.id, 0, c) for c in cases if c.batch == max(choice.batches)]
    cases = [c for c in LEVELS[part].cases(choice) if c.level == part]
    found = [item for case in cases for item in speed_items(part, case, options.quick)]
    return sorted(found, key=lambda item: (item.rank, -item.case.batch))  # stable


def speed_items(part: str, case: Case, quick: bool) -> list[Item]:
    """A case in as many items as are measured apart: what is compiled takes long."""
    every = [n.removesuffix(" bf16") for n in case_names(LEVELS[part], case, gpu=True)]
    its_rank = rank(case, quick)

    def item(suffix: str, least: int, names: Iterable[str]) -> Item:
        kept = [n for n in names if not (quick and COMPILERS & set(n.split()))]
        return Item(case.id + suffix, 0 if quick else max(least, its_rank), case, tuple(kept))

    if part in FIRST:
        plain = [n for n in every if not COMPILERS & set(n.split())]
        first = [n for n in plain if n in FIRST[part]] if its_rank == 0 else plain
        compiled = [n for n in every if n not in plain]
        found = [item("", 0, first), item(COMPILED, 1, [*ANCHORS, *compiled])]
        if len(first) < len(plain):
            rest = [n for n in plain if n not in first]
            found.append(item(CONTIGUOUS, 2, [*ANCHORS, *rest]))
    else:  # autotuning a whole model may take minutes: a case of its own
        default = [n for n in every if "max-autotune" not in n]
        default.sort(key=lambda n: "compile" in n)
        tuned = [*ANCHORS, *(n for n in every if "max-autotune" in n)]
        least = 0 if part == "model" else 1
        found = [item("", least, default), item(AUTOTUNED, least + 1, tuned)]
    return found[:1] if quick else found  # a trial compiles nothing


def rank(case: Case, quick: bool = False) -> int:
    """0: xs, 256 images of 224x224; mixers of one image too. 2: so t. 3: so s and m. 4: the rest."""
    if quick:
        return 0
    pixels = case.size if case.stage is None else case.size * (2 << case.stage)
    one = case.batch == 1 and case.level == "mixer" and case.model == "xs"
    if pixels != GPU_CHOICE.inputs[0] or not (one or case.batch == max(GPU_CHOICE.batches)):
        return 4
    return {"xs": 0, "t": 2}.get(case.model, 3)


def parity_items(options: argparse.Namespace) -> list[Item]:
    """The backend under test on the device, real shapes last; then every other usable backend."""
    device, batch = options.device, max(GPU_CHOICE.batches)
    if options.quick:
        small = testing.cases(options.backend, device=device)
        few = [(0, c) for c in small if c.shape == (5, 3, 7, 7)]
        return unique([*few, *gate_cases(options)])
    found = [(0, case) for case in smoke_cases(options.backend, device)]
    found += gate_cases(options)
    found += [(1, case) for case in testing.cases(options.backend, device=device)]
    found += [(1, c) for c in testing.real_cases(options.backend, 2, device=device)]
    for case in testing.real_cases(options.backend, batch, device=device):
        goal = case.dtype is torch.bfloat16 and case.mode != "frozen" and case.shape[2] % 7 == 0
        found.append((1 if goal else 2, case))
    for status in backends():
        name = status.name
        if status.usable and name in testing.BACKENDS and name != options.backend:
            where = device if serves(name, device) else None
            found += [(2, case) for case in testing.cases(name, device=where)]
    return unique(found)


def gate_cases(options: argparse.Namespace) -> list[tuple[int, testing.Case]]:
    """A few images of every mixer that is timed, in the layouts and the mode it is timed in."""
    found = []
    for part in GATED:
        for item in items(part, options):
            mode = gate.mode_of(vars(item.case))
            plain = any(n.startswith("fused") and "channels_last" not in n for n in item.names)
            for shape in map(gate.few, mixer_shapes(item.case)):
                for layout in ("channels_last", *(["contiguous"] if plain else [])):
                    dtype = getattr(torch, item.case.dtype)
                    case = testing.Case(options.backend, dtype, layout, mode, shape)
                    found.append((item.rank, case._replace(device=options.device)))
    return sorted(found, key=lambda ranked: ranked[0])  # stable: of equal ones the first is kept


def mixer_shapes(case: Case) -> list[tuple[int, ...]]:
    """Of the mixers that a case computes."""
    if case.stage is not None:
        return [(case.batch, case.channels, case.size, case.size)]
    dims = CONFIGS[f"rcvit_{case.model}"].dims
    sizes = [case.size // (4 << stage) for stage in range(len(dims))]
    return [(case.batch, c, size, size) for c, size in zip(dims, sizes, strict=True)]


def smoke_cases(backend: str, device: str) -> list[testing.Case]:
    """Small cases that take every kernel in every dtype, both layouts and every mode."""
    every = testing.cases(backend, device=device)
    found: list[testing.Case] = []
    for shape in SMOKE_SHAPES:
        of_shape = [c for c in every if c.shape == shape]
        # Training in half precision takes the most kernels.
        found += sorted(of_shape, key=lambda c: (c.mode != "train", c.dtype is torch.float32))
    return (found or every)[:SMOKE_CASES]


def unique(ranked: Any) -> list[Item]:
    """Items of (rank, parity case); of one that comes twice the first."""
    found: dict[str, Item] = {}
    for its_rank, case in ranked:
        key = parity_key(case)
        found.setdefault(key, Item(key, its_rank, case))
    return list(found.values())


def parity_key(case: testing.Case) -> str:
    return f"{case}-{case.seed}{'-bias' if case.attn_bias else ''}-{case.device}"


def serves(backend: str, device: str) -> bool:
    problem = Problem(torch.device(device).type, torch.bfloat16)
    return get(backend).why_not(problem) is None
