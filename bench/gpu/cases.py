"""Runs one case of a part and describes the result as JSON."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.schedule import LEVELS, Item
from bench.gpu.store import ROOT
from bench.harness.case import names as case_names
from bench.harness.case import settings_for
from casvit_kernels import testing


def run_parity(case: testing.Case) -> dict[str, Any]:
    row = testing.verdict(case)
    if any("OutOfMemoryError" in failure for failure in row.failures):
        return {"absent": "it needs more memory than this GPU has", "passed": None}
    return {**row._asdict(), "device": case.device, "passed": row.passed}


def run_behaviour(path: str, options: argparse.Namespace) -> dict[str, Any]:
    if options.device == "cpu" or importlib.util.find_spec("pytest") is None:
        return {"absent": "there is no GPU, or no pytest"}
    command = [sys.executable, "-m", "pytest", "-q", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-3000:]}


def run_sanitizer(tool: str, options: argparse.Namespace) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    )
    if program is None or options.device == "cpu":
        return {"absent": "compute-sanitizer is not on this machine, or there is no GPU"}
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99"]
    command += [sys.executable, str(Path(__file__).parent), "--short", "--backend", options.backend]
    # Without torch's cache of blocks, so that reading beyond a tensor is reading beyond a block.
    done = subprocess.run(
        [*command, "--device", options.device],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    output = (done.stdout + done.stderr)[-3000:]
    if "not supported" in output.lower() and done.returncode != 99:
        return {"absent": f"it does not run here: {output[-300:]}"}
    return {"passed": done.returncode == 0, "output": output}


def run_short(options: argparse.Namespace) -> int:
    """Some small cases that take every kernel, for the sanitizer."""
    dtypes = (torch.bfloat16, torch.float32)
    failures = []
    for shape in ((2, 56, 14, 14), (1, 33, 13, 9)):
        for dtype, layout in zip(dtypes, ("channels_last", "contiguous"), strict=True):
            for mode in ("eval", "train"):
                row = testing.verdict(
                    testing.Case(options.backend, dtype, layout, mode, shape, device=options.device)
                )
                failures += row.failures
    print("\n".join(failures) or "passed")
    return 1 if failures else 0


def run_speed(
    part: str, item: Item, limited: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """The case's JSON. In a trial nothing is compiled, nor is what was `limited` before."""
    case, module = item.case, LEVELS[part]
    unwanted = {"compile", "max-autotune"} if options.quick else {item.without}
    names = [n for n in case_names(module, case, gpu=True) if not unwanted & set(n.split())]
    slow = [n for n in names if "max-autotune" in n and item.key in limited]
    settings = settings_for(options.device, options.backend, options.quick)
    found = module.run(case, [n for n in names if n not in slow], settings)
    found.absent |= dict.fromkeys(slow, f"the case was {limited.get(item.key)}")
    gc.collect()
    if options.device != "cpu":
        torch._dynamo.reset()  # gives back the graphs of this case
        torch.cuda.empty_cache()
    return dict(found.as_json())
