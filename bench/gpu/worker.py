"""The process of one part: runs its cases until they are done or the deadline is near."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime  # the builtin one from Python 3.11
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from bench.gpu import store
from bench.gpu.cases import run_behaviour, run_parity, run_sanitizer, run_speed
from bench.gpu.schedule import SPEED, Item, items
from bench.gpu.store import Store
from bench.harness.case import settings_for
from bench.harness.memory import copy_bandwidth
from casvit_kernels import benchmark

LARGE = 4_000_000  # elements of x: such cases of the parity part run one at a time
FATAL = 3  # exit status of a process whose GPU context is lost


def work(part: str, options: argparse.Namespace) -> int:
    """Run what is left of a part, up to a rank, until it is done or the deadline is near."""
    file = store.load(part, options)
    settings = settings_for(options.device, options.backend, options.quick)
    file.document |= {
        "part": part,
        "environment": benchmark.environment(options.device),
        "settings": vars(settings),
    }
    file.save()
    todo = left(part, file, options)
    if part == "parity" and options.jobs > 1:
        work_pooled([i for i in todo if math.prod(i.case.shape) < LARGE], file, options)
        todo = left(part, file, options)
    copy = copy_bandwidth(options.device, options.quick) if part in SPEED and todo else None
    longest = 0.0
    for item in todo:
        start = time.time()
        if start + longest > options.deadline:
            return 0
        mark(options, item.key)
        status = 0
        try:
            if part == "parity":
                found = run_parity(item.case)
            elif part == "behaviour":
                found = run_behaviour(item.case, options)
            elif part == "sanitizer":
                found = run_sanitizer(item.case, options)
            else:
                found = run_speed(part, item, file.document["limited"], options)
                found["copy_bytes_per_s"] = copy
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        if "CUDA error" in str(found.get("error") or found.get("failures")):
            status = FATAL  # nothing runs in this context any more
        file.add({"id": item.key, **found, "seconds": round(time.time() - start, 1)})
        mark(options, None)
        if status:
            return status
        longest = max(longest, time.time() - start)
    return 0


def left(part: str, file: Store, options: argparse.Namespace) -> list[Item]:
    done = file.done
    return [i for i in items(part, options) if i.rank <= options.rank and i.key not in done]


def work_pooled(todo: list[Item], file: Store, options: argparse.Namespace) -> None:
    """Several processes: most of the time goes to compiling kernels, one after the other in each."""
    groups: dict[Any, list[Item]] = {}
    for item in todo:
        case = item.case
        groups.setdefault((case.backend, case.shape[1], case.dtype), []).append(item)
    pool = ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        futures = [pool.submit(run_group, group) for group in groups.values()]
        for future in as_completed(futures, max(0.0, options.deadline - time.time())):
            file.add(*future.result())
    except BrokenProcessPool:
        print("a process of the pool ended: one case at a time from here", flush=True)
    except OutOfTime:
        os._exit(0)  # the parent ends what still runs
    pool.shutdown(cancel_futures=True)


def run_group(group: Iterable[Item]) -> list[dict[str, Any]]:
    return [{"id": item.key, **run_parity(item.case)} for item in group]


def mark(options: argparse.Namespace, key: str | None) -> None:
    """Tell the parent which case runs, and since when."""
    options.marker.write_text(json.dumps({"key": key, "since": time.time()}), encoding="utf-8")
