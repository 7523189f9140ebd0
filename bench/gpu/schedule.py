"""Which cases each part consists of, and in which order they run."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from bench.harness.case import GPU_CHOICE, Case, Choice
from bench.levels import test_mixer, test_model, test_training_speed
from casvit_kernels import backends, testing
from casvit_kernels.backends import Problem, get

TOOLS = ("memcheck", "racecheck")
BEHAVIOUR = "tests/test_gpu.py"  # streams, devices, graphs, compilers
# Which part runs when, up to which rank. Parity comes before any speed; then what the goals need.
SCHEDULE = (
    ("parity", 1),
    ("mixer", 1),
    ("training", 1),
    ("behaviour", 1),
    ("sanitizer", 1),
    ("model", 1),
    ("model-training", 1),
    ("parity", 2),
    ("mixer", 2),
    ("training", 2),
    ("model", 2),
    ("model-training", 2),
    ("mixer", 3),
    ("training", 3),
    ("model", 3),
    ("model-training", 3),
)
PARTS = tuple(dict.fromkeys(part for part, _ in SCHEDULE))
AUTOTUNED = "-max-autotune"  # ends the keys of cases that measure nothing else that is compiled
SPEED = ("mixer", "training", "model", "model-training")
LEVELS: dict[str, Any] = {
    "mixer": test_mixer,
    "training": test_training_speed,
    "model": test_model,
    "model-training": test_model,
}


class Item(NamedTuple):
    """One case of a part; rank 1 is run first."""

    key: str
    rank: int
    case: Any
    without: str = ""  # kind of torch.compile that is not measured


def items(part: str, options: argparse.Namespace) -> list[Item]:
    if part == "parity":
        return parity_items(options)
    if part == "behaviour":
        return [Item(BEHAVIOUR, 1, BEHAVIOUR)]
    if part == "sanitizer":
        return [Item(tool, 1, tool) for tool in TOOLS]
    choice = Choice(("xs",), (1,), (224,), True, True) if options.quick else GPU_CHOICE
    cases = [c for c in LEVELS[part].cases(choice) if c.level == part]
    if part in ("mixer", "training"):
        found = [Item(case.id, rank(case), case) for case in cases]
    else:  # autotuning a whole model may take minutes: a case of its own
        found = [Item(case.id, rank(case), case, "max-autotune") for case in cases]
        if not options.quick:  # which compiles nothing
            found += [Item(c.id + AUTOTUNED, max(2, rank(c)), c, "compile") for c in cases]
    return sorted(found, key=lambda item: item.rank)  # stable


def rank(case: Case) -> int:
    """1: what the goals are about. 2: the rest of batch 256 at 224x224."""
    pixels = case.size if case.stage is None else case.size * (2 << case.stage)
    if case.batch != max(GPU_CHOICE.batches) or pixels != GPU_CHOICE.inputs[0]:
        return 3
    if case.stage is None:
        return 1 if case.model == "xs" else 2
    return 1 if case.model in ("xs", "t") and case.stage <= 2 else 2


def parity_items(options: argparse.Namespace) -> list[Item]:
    """The backend under test on the device, real shapes last; then every other usable backend."""
    device, batch = options.device, max(GPU_CHOICE.batches)
    found = [(1, case) for case in testing.cases(options.backend, device=device)]
    if options.quick:
        found = [(r, c) for r, c in found if c.shape == (5, 3, 7, 7)]
    else:
        found += [(1, c) for c in testing.real_cases(options.backend, 2, device=device)]
        for case in testing.real_cases(options.backend, batch, device=device):
            goal = case.dtype is torch.bfloat16 and case.mode != "frozen" and case.shape[2] % 7 == 0
            found.append((1 if goal else 2, case))
        for status in backends():
            name = status.name
            if status.usable and name in testing.BACKENDS and name != options.backend:
                where = device if serves(name, device) else None
                found += [(2, case) for case in testing.cases(name, device=where)]
    keys = (f"{c}-{c.seed}{'-bias' if c.attn_bias else ''}-{c.device}" for _, c in found)
    once = {
        key: Item(key, r, case) for key, (r, case) in reversed([*zip(keys, found, strict=True)])
    }
    return list(once.values())[::-1]


def serves(backend: str, device: str) -> bool:
    problem = Problem(torch.device(device).type, torch.bfloat16)
    return get(backend).why_not(problem) is None
