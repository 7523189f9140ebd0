"""Small parity cases in several processes: most of their time goes to compiling kernels."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from bench.gpu.gates import run_parity
from bench.gpu.schedule import Item
from bench.gpu.store import Store

TOGETHER = 6  # cases; what a chunk found is written when all of it is done
_lost = False  # in a process of the pool: its GPU context is


def work_pooled(todo: list[Item], file: Store, options: argparse.Namespace) -> None:
    """Cases that share their compiled kernels go to one process, `TOGETHER` at a time."""
    groups: dict[Any, list[Item]] = {}
    for item in todo:
        case = item.case
        layout = "channels_last" in case.layout
        groups.setdefault((case.backend, case.shape[1], case.dtype, layout), []).append(item)
    chunks = [g[i : i + TOGETHER] for g in groups.values() for i in range(0, len(g), TOGETHER)]
    pool = ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,))
    running: set[Future[list[dict[str, Any]]]] = {pool.submit(run_group, c) for c in chunks}
    try:
        while running:
            end = min(options.until, options.deadline) - time.time()
            ready, running = wait(running, max(0.0, min(end, options.case_limit)), FIRST_COMPLETED)
            for future in ready:
                file.add(*future.result())
            if not ready:
                break
    except BrokenProcessPool:
        running = set()
        print("a process of the pool ended: one case at a time from here", flush=True)
    for process in list((pool._processes or {}).values()) if running else ():
        process.kill()  # it hangs, or there is no more time
    pool.shutdown(cancel_futures=True)


def run_group(group: Iterable[Item]) -> list[dict[str, Any]]:
    """Up to the first CUDA error: after that nothing runs here, and is left for another process."""
    global _lost
    found: list[dict[str, Any]] = []
    for item in group:
        if _lost:
            break
        found.append({"id": item.key, **run_parity(item.case)})
        _lost = "CUDA error" in str(found[-1].get("failures"))
    return found
