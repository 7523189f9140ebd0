"""What a profiler sees of the forward's kernels: Nsight Compute's counters, else PyTorch's durations."""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.harness.case import Case, settings_for
from bench.levels.test_mixer import problem
from casvit_kernels import benchmark

KERNELS = ("gates", "combine")  # a part of their names, in every backend
OTHERS = ("channel_gates", "backward")  # names that are none of these
CALLS, WARM = 3, 2  # calls that are looked at, after so many others
METRICS = {  # of Nsight Compute: key in the JSON, factor to its unit
    "gpu__time_duration.sum": "duration_s",
    "dram__bytes_read.sum": "dram_bytes",
    "dram__bytes_write.sum": "dram_bytes",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
}
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "second": 1.0, "msecond": 1e-3}
UNITS |= {"usecond": 1e-6, "nsecond": 1e-9, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6}
UNITS |= {"Gbyte": 1e9, "%": 1.0}
LIMIT = 60.0  # seconds for Nsight Compute


def run_counters(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The kernels of one mixer after its qkv product, with the reason for what is missing."""
    counted, why = nsight(case, options)
    if counted:
        return {"profiler": "Nsight Compute", "kernels": counted}
    timed = torch_profile(case, options)
    if timed:
        return {"profiler": f"torch.profiler; no counters: {why}", "kernels": timed}
    return {"absent": f"{why}; torch.profiler saw no kernel named {' or '.join(KERNELS)}"}


def kernel_named(name: str) -> str | None:
    """Which of `KERNELS` a kernel is."""
    if any(other in name for other in OTHERS):
        return None
    return next((kernel for kernel in KERNELS if kernel in name), None)


def mixing(case: Case, options: argparse.Namespace) -> benchmark.Call:
    settings = settings_for(options.device, options.backend, options.quick)
    mixer, x = problem(case, settings)
    name = "fused mix channels_last" + benchmark.BF16
    calls = benchmark.mixer_candidates(mixer, x, include=[name], backend=options.backend)
    return calls[name]


def probe(options: argparse.Namespace) -> int:
    """What Nsight Compute looks at: a process that only calls the mixing of a case."""
    from bench.gpu.schedule import items

    (case,) = [item.case for item in items("counters", options) if item.key == options.probe]
    with torch.inference_mode():
        call = mixing(case, options)
        for _ in range(WARM + CALLS):
            call()
    if options.device != "cpu":
        torch.cuda.synchronize()
    return 0


def nsight(case: Case, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The kernels, or none and the reason."""
    program = find_nsight()
    if program is None:
        return [], "Nsight Compute (ncu) is not on this machine"
    if options.device == "cpu":
        return [], "there is no GPU"
    pattern = "regex:" + "|".join(KERNELS)
    command = [program, "--csv", "--page", "raw", "--print-units", "base"]
    command += ["--metrics", ",".join(METRICS), "--kernel-name", pattern, "--clock-control", "none"]
    command += [sys.executable, str(Path(__file__).parent), "--probe", case.id]
    command += ["--device", options.device, "--backend", options.backend]
    command += ["--quick"] if options.quick else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except (subprocess.TimeoutExpired, OSError) as error:
        return [], f"ncu: {type(error).__name__} after at most {LIMIT:.0f} s"
    found = read_csv(done.stdout)
    if found:
        return found, ""
    said = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line]
    text = said[0] if said else (done.stderr.strip().splitlines() or ["no kernel found"])[-1]
    return [], f"ncu ended with status {done.returncode}: {text[:300]}"


def find_nsight() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [None, f"{home}/bin", "/usr/local/cuda/bin"]
    places += sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)
    found = (shutil.which("ncu", path=place) for place in places)
    return next((program for program in found if program is not None), None)


def read_csv(text: str) -> list[dict[str, Any]]:
    """Medians over the launches of each kernel, of what `ncu --csv --page raw` prints."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return []
    units, *rows = csv.DictReader(lines[header:])  # the second line has the units
    launches: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        kernel = kernel_named(row.get("Kernel Name") or "")
        if kernel is None:
            continue
        values: dict[str, float] = {}
        for metric, key in METRICS.items():
            number = (row.get(metric) or "").replace(",", "")
            unit = UNITS.get((units.get(metric) or "").strip())
            try:
                values[key] = values.get(key, 0.0) + float(number) * (unit or 1.0)
            except ValueError:  # this GPU has no such counter
                continue
        launches.setdefault(kernel, []).append(values)
    return summary(launches)


def summary(launches: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """For each kernel the median of each value over its last launches."""
    found = []
    for name in KERNELS:
        last = launches.get(name, [])[-CALLS:]
        keys = dict.fromkeys(key for values in last for key in values)
        medians = {k: sorted(v[k] for v in last if k in v) for k in keys}
        of_kernel = {k: float(f"{v[len(v) // 2]:.4g}") for k, v in medians.items()}
        if "duration_s" in of_kernel:
            found.append({"name": name, "launches": len(last), **of_kernel})
    return found


def torch_profile(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Durations alone."""
    from torch.profiler import ProfilerActivity, profile

    device = "CUDA" if options.device != "cpu" else "CPU"
    with torch.inference_mode():
        try:
            call = mixing(case, options)
            for _ in range(WARM):
                call()
        except benchmark.Unavailable:
            return []
        with profile(activities=[getattr(ProfilerActivity, device)]) as seen:
            for _ in range(CALLS):
                call()
            if device == "CUDA":
                torch.cuda.synchronize()
    return durations(event for event in seen.events() if event.device_type.name == device)


def durations(events: Iterable[Any]) -> list[dict[str, Any]]:
    """Of the kernels among a profiler's events."""
    launches: dict[str, list[dict[str, float]]] = {}
    for event in events:
        kernel = kernel_named(event.name)
        if kernel is not None:
            seconds = 1e-6 * event.time_range.elapsed_us()
            launches.setdefault(kernel, []).append({"duration_s": seconds})
    return summary(launches)
