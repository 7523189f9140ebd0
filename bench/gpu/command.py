"""Parity, sanitizer and speed on a GPU: one command, in parts, within a budget of time.

    python bench/gpu                        all parts, the most important cases first
    python bench/gpu --parts parity,mixer   some of them
    python bench/gpu --device cpu --quick   try the machinery without a GPU

Every part writes its JSON file after each of its cases. A case that the file holds for the same sources,
GPU and torch is not run again, so the next call goes on where the budget of this one ended. Files lie
in $OUT, else in bench/results, in a folder named after the GPU; `python bench/report` makes tables of
the latter. Each part runs in a process of its own: a crash, or a case that takes too long, costs that
case.
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

from bench.gpu import store, supervise
from bench.gpu.cases import run_short
from bench.gpu.schedule import PARTS, SCHEDULE, SPEED, items, serves
from bench.gpu.store import RESULTS, ROOT
from bench.gpu.worker import work
from bench.report.goals import goal_lines
from casvit_kernels import backends, testing


def build_native() -> None:
    """The CPU kernels, where a compiler is; Triton does without."""
    if (ROOT / "casvit_kernels" / "_C.so").exists():
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
    refused: dict[str, str] = {}
    for part, rank in SCHEDULE:
        if part not in options.parts or not supervise.left_of(part, rank, options):
            continue
        if time.time() > options.deadline - 1:
            break
        reason = supervise.red(options) if part in SPEED else None
        if reason is not None:
            refused[part] = f"no speed: {reason}"
        else:
            print(f"[{time.time() - options.started:4.0f} s] {part}, rank {rank}", flush=True)
            supervise.supervise(part, rank, options)
    return conclude(refused, options)


def conclude(refused: dict[str, str], options: argparse.Namespace) -> int:
    """Print what was done and what was not, and the goals. 1 where something is wrong."""
    print(
        f"[{time.time() - options.started:4.0f} s] results in {store.folder(options, options.out)}"
    )
    bad = bool(refused)
    for part in options.parts:
        file = store.load(part, options)
        wanted, done = items(part, options), file.done
        missing = [item for item in wanted if item.key not in done]
        print(f"{part}: {len(wanted) - len(missing)} of {len(wanted)} cases")
        if missing:
            print(f"  not done: {len(missing)}, the next {missing[0].key}; call again to go on")
        problems = list(file.document.get("problems", []))
        problems += [refused[part]] if part in refused else []
        for key, case in done.items():
            text = case.get("error") or case.get("refused") or "; ".join(case.get("failures", ()))
            if text or case.get("passed") is False:
                problems.append(f"{key}: {text or 'failed'}")
            elif "absent" in case:
                print(f"  {key}: not run, {case['absent']}")
        for text in problems[:20]:
            print(f"  {text[:300]}")
        if len(problems) > 20:
            print(f"  and {len(problems) - 20} more")
        bad = bad or bool(problems)
    documents = (
        [] if supervise.red(options) else [store.load(part, options).document for part in SPEED]
    )
    print("goals (bfloat16, batch 256, 224x224 input):")
    for line in goal_lines(documents):
        print(f"  {line}")
    return 1 if bad else 0


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=540, help="seconds, default %(default)g")
    parser.add_argument(
        "--case-limit", type=float, default=150, help="seconds for one case, default %(default)g"
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--backend", help="whose speed is measured; default: the first usable one")
    parser.add_argument("--jobs", type=int, help="processes of the parity part, default up to 12")
    parser.add_argument("--quick", action="store_true", help="try the machinery on tiny cases")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    parser.add_argument("--no-build", dest="build", action="store_false")
    for hidden in ("--child", "--rank", "--deadline", "--marker"):
        kind: Callable[[str], Any] = {"--rank": int, "--deadline": float, "--marker": Path}.get(
            hidden, str
        )
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.started = time.time()
    options.deadline = options.deadline or options.started + options.budget
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
    return work(options.child, options) if options.child else run(options)
