"""Starts a process for each part, watches its clock, and starts it again after a crash."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu import store
from bench.gpu.schedule import SPEED, Item, items
from bench.gpu.store import ROOT, UNFINISHED, Store
from bench.gpu.worker import NOT_IN_TURN, left
from bench.harness.stepwise import IN_TURN
from casvit_kernels import benchmark


def supervise(part: str, rank: int, options: argparse.Namespace) -> None:
    """Start the part's process, again after each crash, until it is through or time is up."""
    with tempfile.TemporaryDirectory() as scratch:
        marker = Path(scratch) / "running"
        file = store.load(part, options)
        if file.document.pop("problems", None):
            file.save()
        while left_of(part, rank, options):
            marker.unlink(missing_ok=True)
            before = store.load(part, options).progress
            ended, seconds = watch(start(part, rank, marker, options), marker, options)
            if ended == 0 or time.time() > options.deadline:
                return
            reason = f"the process ended with status {ended}"
            if ended is None:
                reason = f"did not finish within {seconds:.0f} s, and was ended"
            file = store.load(part, options)
            running = json.loads(marker.read_text()) if marker.exists() else {"key": None}
            if running["key"] is not None and not recorded(part, running, before, file):
                blame(part, running, reason, file, options)
            elif file.progress == before:
                file.document.setdefault("problems", []).append(f"{reason} before its first case")
                file.save()
                return


def recorded(part: str, running: dict[str, Any], before: int, file: Store) -> bool:
    """Whether the process wrote itself what went wrong with the candidate that it was at."""
    rows = (file.begun(running["key"]) or {}).get("rows", ())
    mine = [row for row in rows if row["candidate"] == running.get("candidate")]
    return part in SPEED and bool(mine) and not any("median_s" in row for row in mine)


def blame(
    part: str, running: dict[str, Any], reason: str, file: Store, options: argparse.Namespace
) -> None:
    """Write an error to what was running: a candidate of a case, or the case."""
    key, candidate = running["key"], running.get("candidate")
    case = file.begun(key) or {"id": key}
    item = next(item for item in items(part, options) if item.key == key)
    suffix = benchmark.BF16 if getattr(item.case, "dtype", None) == "bfloat16" else ""
    if part in SPEED and candidate in [name + suffix for name in item.names]:
        rows = [row for row in case.get("rows", ()) if row["candidate"] != candidate]
        rows.append({"candidate": candidate, "error": reason})
        file.add({**vars(item.case), **case, "rows": rows, UNFINISHED: True})
        return
    case.pop(UNFINISHED, None)
    what = "error"
    if candidate == IN_TURN and case.get("rows"):  # each was measured alone
        what = NOT_IN_TURN
    file.add({**case, what: reason})


def start(
    part: str, rank: int, marker: Path, options: argparse.Namespace
) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).parent), "--child", part, "--rank", str(rank)]
    given = ("device", "backend", "jobs", "deadline", "until", "started", "out", "case_limit")
    for name in given:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--marker", str(marker), *(["--quick"] if options.quick else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if part == "parity":
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # equal calls give equal bits
    return subprocess.Popen(command, env=environment, start_new_session=True)


def watch(
    process: subprocess.Popen[bytes], marker: Path, options: argparse.Namespace
) -> tuple[int | None, float]:
    """The process's status, None if it was ended here; and the seconds of what it was at."""
    seconds = 0.0
    try:
        while True:
            try:
                return process.wait(timeout=0.1), seconds
            except subprocess.TimeoutExpired:
                pass
            now = time.time()
            try:
                running = json.loads(marker.read_text())
                seconds = now - running["since"] if running["key"] else 0.0
            except (OSError, ValueError):  # not there yet
                pass
            if now > options.deadline or seconds > options.case_limit:
                return None, seconds
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own compilers and workers with it
        process.wait()


def left_of(part: str, rank: int, options: argparse.Namespace) -> list[Item]:
    return left(
        part, store.load(part, options), argparse.Namespace(**{**vars(options), "rank": rank})
    )
