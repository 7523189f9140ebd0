"""Memory of a GPU: what a call allocates and keeps, and how fast a copy is."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

from bench.harness.case import Case
from bench.static.saved_bytes import kept_by
from casvit_kernels import benchmark


def of_call(case: Case, name: str, call: Callable[[], object]) -> dict[str, int]:
    """The most that a call allocates on the GPU, and what a mixer keeps for its backward.

    In bytes, beyond what stays between calls. A CUDA graph never gives its memory back: no figure.
    """
    found = {}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for _ in range(3):  # graphs are recorded
            call()
        if not {"max-autotune", "graph"} & set(name.split()):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    if case.level == "training" and name.startswith(("eager", "fused")):
        own = {t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) is nn.Parameter}
        found["kept_bytes"] = sum(kept_by(call, own).values())
    return found


def copy_bandwidth(device: str, quick: bool = False) -> float:
    """Bytes per second of a copy within the device's memory, read and written ones; the median."""
    size = 1 << (24 if quick or device == "cpu" else 30)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    watch: benchmark.Stopwatch = benchmark.WallStopwatch()
    if device != "cpu":
        watch = benchmark.CudaStopwatch(torch.device(device), cold=False)
    found = benchmark.interleave(
        {"copy": lambda: target.copy_(source)},
        rounds=9,
        min_round_seconds=0.0,
        pause_seconds=0.0,
        stopwatch=watch,
    )
    return 2 * size / found["copy"].median
