"""What the tests of bench/gpu share: its parts in this process, or in forks of it, on tiny work."""

import argparse
import faulthandler
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu import command as gpu  # noqa: E402
from bench.gpu import schedule, store, supervise, worker  # noqa: E402
from bench.harness.case import Case, Settings  # noqa: E402
from bench.harness.measure import measure  # noqa: E402

TRIAL = ("--device", "cpu", "--backend", "cpu", "--quick", "--no-build")
KEY = "xs-stage4-7px-b1-bfloat16"  # of the only mixer case of a trial
MODEL_KEY = "xs-64px-b1-bfloat16"
KEYS = {"mixer": KEY, "training": KEY, "model": MODEL_KEY, "model-training": MODEL_KEY}


def options(out, *more):
    return gpu.arguments([*TRIAL, "--out", str(out), *more])


def run(out, *more):
    return gpu.main([*TRIAL, "--out", str(out), *more])


def read(out, part):
    return json.loads((out / "cpu" / f"{part}.json").read_text())


def inside(patch):
    """Run each part's process here; the list says which were started."""
    started = []

    def start(part, rank, marker, options):
        started.append(part)
        return part, argparse.Namespace(**{**vars(options), "rank": rank, "marker": marker})

    patch.setattr(supervise, "start", start)
    patch.setattr(supervise, "watch", lambda process, *_: (worker.work(*process), 0.0))
    return started


class Fork:
    """A part's process that is a fork of this one, faults and all, and need not import torch again."""

    def __init__(self, part, given):
        self.pid = os.fork()
        self.status = None
        if self.pid == 0:
            faulthandler.disable()
            os.setsid()
            status = 1
            try:
                status = worker.work(part, given)
            finally:
                os._exit(status)

    def wait(self, timeout=None):
        end = time.time() + (timeout or 60)
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.time() > end:
                raise subprocess.TimeoutExpired("fork", timeout)
            else:
                time.sleep(0.005)
        return self.status

    poll = wait


def forked(patch):
    """Run each part's process in a fork; the list says which were started."""
    started = []

    def start(part, rank, marker, options):
        given = argparse.Namespace(**{**vars(options), "rank": rank, "marker": marker})
        started.append(Fork(part, given))
        return started[-1]

    patch.setattr(supervise, "start", start)
    return started


def tiny(patch):
    """Cases of every level compute next to nothing; the dict takes a fault for each candidate."""
    faults = {}

    def run(case, names, settings, watcher=None):
        settings = Settings(1, 0.0, settings.backend, True, pause_seconds=0.0)

        def call(name):
            def compute():
                if name in faults:
                    faults[name]()
                return torch.ones(1, 1, 2, 2)

            return compute

        # Whatever the level is: an output and no gradients.
        level = Case(**{**vars(case), "level": "mixer"})
        candidates = {name: call(name) for name in names}
        x = torch.ones(1, 1, 2, 2)
        found = measure(level, nn.Identity(), x, candidates, settings, None, watcher)
        found.case = case
        return found

    for level in set(schedule.LEVELS.values()):
        patch.setattr(level, "run", run)
    patch.setattr(worker, "copy_bandwidth", lambda *_: 1e10)
    patch.setattr(gc, "collect", lambda: 0)  # a tenth of a second each in a fork
    return faults


def judge(out, verdict=lambda key: True):
    """Verdicts of the parity part that nobody computed."""
    given = options(out)
    file = store.open_to_write("parity", given)
    keys = [item.key for item in schedule.items("parity", given)]
    file.add(*({"id": key, "passed": verdict(key)} for key in keys))


def goal_case(level, stage, medians_us, model="xs", batch=256, calls_us=None, **kept):
    """A case as the script writes it."""
    rows = [
        {
            "candidate": f"{name} bf16",
            "median_s": us / 1e6,
            "p25_s": us / 1e6,
            "p75_s": us / 1e6,
            "peak_bytes": 3 << 20,
            **({"call_s": calls_us[name] / 1e6} if calls_us else {}),
            **({"kept_bytes": kept[name]} if name in kept else {}),
        }
        for name, us in medians_us.items()
    ]
    case = Case(level, model, stage, 48, 112 >> stage, batch, "bfloat16")
    return {"id": case.id, **vars(case), "rows": rows, "copy_bytes_per_s": 3e12}


def hang_in_pool(group):
    """Instead of `pool.run_group`, in a process of the pool."""
    time.sleep(300)


class _Patch:
    """For a process that ends with its patches."""

    @staticmethod
    def setattr(target, name, value):
        setattr(target, name, value)


def main(candidate):
    """The real command in its real processes, but on tiny work, in which `candidate` hangs."""

    def hang():
        print("hangs", flush=True)
        time.sleep(300)

    popen = subprocess.Popen
    tiny(_Patch)[candidate] = hang
    supervise.subprocess.Popen = lambda command, **kept: popen(
        [command[0], __file__, candidate, *command[2:]], **kept
    )
    return gpu.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
