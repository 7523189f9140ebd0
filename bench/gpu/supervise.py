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

from bench.gpu import store
from bench.gpu.schedule import AUTOTUNED, SPEED, Item, items
from bench.gpu.store import ROOT
from bench.gpu.worker import left


def supervise(part: str, rank: int, options: argparse.Namespace) -> None:
    """Start the part's process, again after each crash, until it is through or time is up."""
    with tempfile.TemporaryDirectory() as scratch:
        marker = Path(scratch) / "running"
        file = store.load(part, options)
        if file.document.pop("problems", None):
            file.save()
        while left_of(part, rank, options):
            marker.unlink(missing_ok=True)
            before = len(store.load(part, options).done)
            ended, seconds = watch(start(part, rank, marker, options), marker, options)
            if ended == 0 or time.time() > options.deadline:
                return
            running = json.loads(marker.read_text())["key"] if marker.exists() else None
            file = store.load(part, options)
            if running is None:
                if len(file.done) == before:
                    file.document.setdefault("problems", []).append(
                        f"the process ended with status {ended} before its first case"
                    )
                    file.save()
                    return
                continue
            if ended is None:
                limited = file.document["limited"]
                again = part in SPEED and running not in limited and AUTOTUNED not in running
                limited[running] = f"not within {seconds:.0f} s"
                reason = None if again else f"did not finish within {seconds:.0f} s, and was ended"
            else:
                reason = f"the process ended with status {ended}"
            if reason is not None:
                file.add({"id": running, "error": reason})
            file.save()


def start(
    part: str, rank: int, marker: Path, options: argparse.Namespace
) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).parent), "--child", part, "--rank", str(rank)]
    command += [
        "--device",
        options.device,
        "--backend",
        options.backend,
        "--jobs",
        str(options.jobs),
    ]
    command += ["--deadline", str(options.deadline), "--marker", str(marker)]
    command += ["--out", str(options.out), "--case-limit", str(options.case_limit)]
    command += ["--quick"] if options.quick else []
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
    """The process's status, None if it was ended here; and the seconds that its last case took."""
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
            except (OSError, ValueError):  # not there yet, or half written
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


def red(options: argparse.Namespace) -> str | None:
    """Why no speed may be measured yet, or None."""
    done = store.load("parity", options).done
    first = [item.key for item in items("parity", options) if item.rank == 1]
    own = f"{options.backend}-"
    wrong = [
        key
        for key, case in done.items()
        if key.startswith(own) and not case.get("passed") and "absent" not in case
    ]
    if wrong:
        return f"parity is red, {len(wrong)} of {len(done)} cases, the first: {wrong[0]}"
    missing = sum(key not in done for key in first)
    return f"parity is not complete, {missing} cases are left" if missing else None
