"""Runs one case of a part and describes the result as JSON."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.gpu.schedule import LEVELS, Item
from bench.gpu.store import ROOT
from bench.harness.case import settings_for
from bench.harness.stepwise import Watcher
from casvit_kernels import testing
from casvit_kernels.backends import cuda


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
    """Some small cases that take every kernel, for the sanitizer; of `cuda` in one launch and in two."""
    roads = [cuda.launches(n) for n in (1, 2)] if options.backend == "cuda" else [nullcontext()]
    failures = []
    for road in roads:
        with road:
            failures += _short_failures(options)
    print("\n".join(failures) or "passed")
    return 1 if failures else 0


def _short_failures(options: argparse.Namespace) -> list[str]:
    computed = testing.BACKENDS[options.backend].dtypes
    other = torch.float32 if torch.float32 in computed else torch.float16
    failures = []
    for shape in ((2, 56, 14, 14), (1, 33, 13, 9)):
        for dtype, layout in ((torch.bfloat16, "channels_last"), (other, "contiguous")):
            for mode in ("eval", "train"):
                row = testing.verdict(
                    testing.Case(options.backend, dtype, layout, mode, shape, device=options.device)
                )
                failures += row.failures
    return failures


def run_speed(
    part: str, item: Item, names: list[str], options: argparse.Namespace, watcher: Watcher
) -> dict[str, Any]:
    """The case's JSON, of these candidates; the watcher gets it as it grows."""
    settings = settings_for(options.device, options.backend, options.quick)
    try:
        found = LEVELS[part].run(item.case, names, settings, watcher)
    finally:
        gc.collect()
        if options.device != "cpu":
            torch._dynamo.reset()  # gives back the graphs of this case
            torch.cuda.empty_cache()
    return dict(found.as_json())
