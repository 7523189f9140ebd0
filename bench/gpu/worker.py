"""The process of one part: runs its cases until they are done or the deadline is near."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import threading
import time
from typing import Any

from bench.gpu import gates, store
from bench.gpu.cases import run_behaviour, run_sanitizer, run_speed
from bench.gpu.counters import run_counters
from bench.gpu.pool import work_pooled
from bench.gpu.schedule import GATED, SPEED, Item, items
from bench.gpu.store import UNFINISHED, Store
from bench.harness.memory import copy_bandwidth
from bench.harness.results import Measured
from bench.harness.stepwise import IN_TURN, ContextLost
from casvit_kernels import benchmark

LARGE = 4_000_000  # elements of x: such cases of the parity part run one at a time
NOT_IN_TURN = "not_in_turn"  # why there are only times of candidates alone
FATAL = 3  # exit status of a process whose GPU context is lost


class OutOfTime(Exception):
    """No candidate begins any more; what is there of the case is written."""


def work(part: str, options: argparse.Namespace) -> int:
    """Run what is left of a part, up to a rank, until it is done or the deadline is near."""
    file = store.open_to_write(part, options)
    file.save()
    todo = left(part, file, options)
    if part == "parity" and options.jobs > 1:
        work_pooled([i for i in todo if math.prod(i.case.shape) < LARGE], file, options)
        todo = left(part, file, options)
    copy = copy_bandwidth(options.device, options.quick) if part in GATED and todo else None
    parity, longest = store.load("parity", options), 0.0
    for item in todo:
        start = time.time()
        if start + longest > options.deadline or start > options.until:
            return 0
        if part in GATED and not gates.is_judged(item.case, options.backend, parity):
            continue  # it waits for the parity part
        mark(options, item.key)
        try:
            found = run_item(part, item, file, copy, options)
        except OutOfTime:
            mark(options, None)
            return 0
        except Exception as error:
            found = {
                **(file.begun(item.key) or {}),
                "error": f"{type(error).__name__}: {error}"[:2000],
            }
        found.pop(UNFINISHED, None)
        found["seconds"] = round(time.time() - start, 1)
        if found.pop("lost", False):  # what is left of the case is for another process
            return FATAL
        file.add({"id": item.key, **found})
        mark(options, None)
        if "CUDA error" in str([found.get(k) for k in ("error", "failures", NOT_IN_TURN)]):
            return FATAL  # nothing runs in this context any more
        longest = max(longest, time.time() - start)
    return 0


def run_item(
    part: str, item: Item, file: Store, copy: float | None, options: argparse.Namespace
) -> dict[str, Any]:
    """One case as JSON; `lost` in it: the context is, and the case is not done."""
    if part == "parity":
        return gates.run_parity(item.case)
    if part == "behaviour":
        return run_behaviour(item.case, options)
    if part == "sanitizer":
        return run_sanitizer(item.case, options)
    described = {**gates.described(item.case), "copy_bytes_per_s": copy}
    reason = gates.refusal(item.case, options.backend, store.load("parity", options))
    if reason is not None:
        return {**described, "refused": reason}
    if part not in SPEED:
        return {**described, **run_counters(item.case, options)}
    return Speed(part, item, file, described, options).run()


class Speed:
    """A case candidate by candidate: told by `stepwise` what begins and what was found."""

    def __init__(
        self,
        part: str,
        item: Item,
        file: Store,
        described: dict[str, Any],
        options: argparse.Namespace,
    ) -> None:
        self.part, self.item, self.file = part, item, file
        self.described, self.options, self.at = described, options, ""
        before = (file.begun(item.key) or {}).get("rows", [])
        # What was measured is measured again, in turn with the rest; what could not be is not.
        self.wrong = [row for row in before if "error" in row or "absent" in row]
        self.before = [row for row in before if "median_s" in row]

    def run(self) -> dict[str, Any]:
        wrong = {row["candidate"] for row in self.wrong}
        suffix = benchmark.BF16 if self.item.case.dtype == "bfloat16" else ""
        names = [n + suffix for n in self.item.names if n + suffix not in wrong]
        try:
            return self._joined(run_speed(self.part, self.item, names, self.options, self))
        except ContextLost:
            return {"lost": True}
        except OutOfTime:
            raise
        except Exception as error:
            if self.at != IN_TURN:
                raise
            text = f"{type(error).__name__}: {error}"[:2000]
            return {**(self.file.begun(self.item.key) or {}), NOT_IN_TURN: text}

    def begins(self, what: str) -> None:
        # Taking turns is short, and then the case is done.
        until = self.options.deadline if what == IN_TURN else self.options.until
        if time.time() > until:
            raise OutOfTime
        self.at = what
        mark(self.options, self.item.key, what)

    def found(self, measured: Measured) -> None:
        found = self._joined(measured.as_json())
        self.file.add({"id": self.item.key, **found, UNFINISHED: True})
        rows = {row["candidate"]: row for row in found["rows"]}
        if self.at in rows:
            say(self.options, f"{self.item.key}, {self.at}: {told(rows[self.at])}")

    def _joined(self, found: dict[str, Any]) -> dict[str, Any]:
        """With what is known from before of the candidates that this process has no row of."""
        new = found.get("rows", [])
        names = {row["candidate"] for row in new}
        kept = [row for row in (*self.before, *self.wrong) if row["candidate"] not in names]
        return {**self.described, **found, "rows": [*new, *kept]}


def told(row: dict[str, Any]) -> str:
    if "median_s" not in row:
        return str(row.get("absent") or row.get("error"))[:200]
    call = f", {1e3 * row['call_s']:.4g} ms of CPU a call" if "call_s" in row else ""
    return f"{1e3 * row['median_s']:.4g} ms{call}"


def say(options: argparse.Namespace, text: str) -> None:
    print(f"[{time.time() - options.started:4.0f} s]   {text}", flush=True)


def end_with_parent() -> None:
    """End this process and those it started when its parent is gone: the GPU is for the next run."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def left(part: str, file: Store, options: argparse.Namespace) -> list[Item]:
    done = file.done
    return [i for i in items(part, options) if i.rank <= options.rank and i.key not in done]


def mark(options: argparse.Namespace, key: str | None, candidate: str | None = None) -> None:
    """Tell the parent which case and candidate run, and since when."""
    now = {"key": key, "candidate": candidate, "since": time.time()}
    draft = options.marker.with_suffix(".draft")
    draft.write_text(json.dumps(now), encoding="utf-8")
    os.replace(draft, options.marker)  # never half written
