"""Parity, sanitizer and speed on a GPU: one command, in parts, within a budget of time.

    python bench/gpu                        all parts, the most important cases first
    python bench/gpu --parts parity,mixer   some of them
    python bench/gpu --device cpu --quick   try the machinery without a GPU

The steps of `schedule.SCHEDULE` run in the order of their worth; what a step leaves when its time is up
comes after all of them. Every part writes its JSON file after each case, parts that time after each
candidate. A case that the file holds for the same sources, GPU and torch is not run again, so the next
call goes on where the budget of this one ended. Files lie in $OUT, else in bench/results, in a folder
named after the GPU; `python bench/report` makes tables of the latter. Each part runs in a process of its
own: a crash, a CUDA error, or what takes too long, costs that case, or that candidate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu import gates, store, supervise
from bench.gpu.cases import run_short
from bench.gpu.counters import probe
from bench.gpu.schedule import GATED, PARTS, SCHEDULE, SPEED, items, serves
from bench.gpu.store import RESULTS, ROOT
from bench.gpu.worker import NOT_IN_TURN, end_with_parent, work
from bench.report.counters import diagnosis
from bench.report.gate import gated
from bench.report.goals import goal_lines
from casvit_kernels import backends, testing
from casvit_kernels.backends import get


def build_native() -> None:
    """The CPU kernels, where a compiler is; Triton does without. Not where a library is that serves."""
    if (ROOT / "casvit_kernels" / "_C.so").exists():
        reason = get("cpu").why_not(None)
        print("native library:", "the one that is there" if reason is None else reason, flush=True)
        if reason is None:
            return
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        said = ["not built within 120 s"]
    built = (ROOT / "casvit_kernels" / "_C.so").exists()
    print("native library:", "built" if built else f"not built; {' '.join(said)}", flush=True)


def run(options: argparse.Namespace) -> int:
    if options.build:
        build_native()
    for name, value in store.stamp(options).items():
        print(f"{name}: {value}")
    for limited in (True, False):
        for step in SCHEDULE:
            if step.part not in options.parts or time.time() > options.deadline - 1:
                continue
            if not supervise.left_of(step.part, step.rank, options):
                continue
            options.until = options.deadline
            if limited:
                options.until = min(options.deadline, time.time() + step.seconds)
            print(
                f"[{time.time() - options.started:4.0f} s] {step.part}, rank {step.rank}",
                flush=True,
            )
            supervise.supervise(step.part, step.rank, options)
    return conclude(options)


def conclude(options: argparse.Namespace) -> int:
    """Print what was done and what was not, and the goals. 1 where something is wrong."""
    where = store.folder(options, options.out)
    print(f"[{time.time() - options.started:4.0f} s] results in {where}")
    parity = store.load("parity", options)
    bad = False
    for part in options.parts:
        file = store.load(part, options)
        wanted, done = items(part, options), file.done
        missing = [item for item in wanted if item.key not in done]
        print(f"{part}: {len(wanted) - len(missing)} of {len(wanted)} cases")
        if missing:
            print(f"  not done: {len(missing)}, the next {missing[0].key}; call again to go on")
            if part in GATED and not gates.is_judged(missing[0].case, options.backend, parity):
                print("  no speed before parity was checked: its mixers have no verdict")
        problems = list(file.document.get("problems", []))
        for case in file.document["cases"]:
            problems += said(case)
        for text in problems[:20]:
            print(f"  {text[:300]}")
        if len(problems) > 20:
            print(f"  and {len(problems) - 20} more")
        bad = bad or bool(problems)
        for text in absences(file.document["cases"])[:20]:
            print(f"  {text[:300]}")
    documents = {p: gated(store.load(p, options).document, parity.document) for p in GATED}
    print("goals (bfloat16, 224x224 input, batch 256 where nothing else is said):")
    for line in goal_lines(documents[part] for part in SPEED):
        print(f"  {line}")
    for line in diagnosis(documents["counters"]):
        print(f"  {line}")
    return 1 if bad else 0


def said(case: dict[str, Any]) -> list[str]:
    """What went wrong in a case, and with its candidates."""
    texts = [case.get(key) for key in ("error", "refused", NOT_IN_TURN)]
    texts += case.get("failures", ())
    if case.get("passed") is False and not any(texts):
        texts.append("failed")
    found = [f"{case['id']}: {text}" for text in texts if text]
    rows = case.get("rows", ())
    return found + [f"{case['id']}, {r['candidate']}: {r['error']}" for r in rows if "error" in r]


def absences(cases: list[dict[str, Any]]) -> list[str]:
    """What was not run, each reason once."""
    found = {case["absent"]: case["id"] for case in reversed(cases) if "absent" in case}
    for case in reversed(cases):
        for row in case.get("rows", ()):
            if "absent" in row:
                found[row["absent"]] = f"{case['id']}, {row['candidate']}"
    return [f"{name}: not run, {reason}" for reason, name in reversed(found.items())]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=540, help="seconds, default %(default)g")
    parser.add_argument(
        "--case-limit",
        type=float,
        default=150,
        help="seconds for one case, or candidate of one, default %(default)g",
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--backend", help="whose speed is measured; default: the first usable one")
    parser.add_argument("--jobs", type=int, help="processes of the parity part, default up to 12")
    parser.add_argument("--quick", action="store_true", help="try the machinery on tiny cases")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    parser.add_argument("--no-build", dest="build", action="store_false")
    hidden: dict[str, Callable[[str], Any]] = {"--child": str, "--rank": int, "--probe": str}
    hidden |= {"--marker": Path, "--deadline": float, "--until": float, "--started": float}
    for name, kind in hidden.items():
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.started = options.started or time.time()
    options.deadline = options.deadline or options.started + options.budget
    options.until = options.until or options.deadline
    options.parts = options.parts.split(",")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts: expected names out of {','.join(PARTS)}, got {','.join(unknown)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no GPU")
    usable = [
        status.name
        for status in backends()
        if status.name != "reference" and serves(status.name, options.device)
    ]
    if options.backend is None and not usable:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in backends() if s.reason)
        parser.error(f"--backend: none is usable on {options.device} ({reasons})")
    options.backend = options.backend or usable[0]
    if options.backend not in testing.BACKENDS or not serves(options.backend, options.device):
        expected = ", ".join(usable) or "none"
        parser.error(
            f"--backend: expected one that serves {options.device} ({expected}), got {options.backend}"
        )
    if options.jobs is None:
        options.jobs = 1 if options.device == "cpu" else min(12, os.cpu_count() or 1)
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.short:
        return run_short(options)
    if options.probe:
        return probe(options)
    if options.child:
        end_with_parent()
        return work(options.child, options)
    return run(options)
