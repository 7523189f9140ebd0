"""Parity, sanitizer and speed on a GPU: one command, in parts, within a budget of time.

    python bench/gpu.py                        all parts, the most important cases first
    python bench/gpu.py --parts parity,mixer   some of them
    python bench/gpu.py --device cpu --quick   try the machinery without a GPU

Every part writes its JSON file after each of its cases. A case that the file holds for the same sources,
GPU and torch is not run again, so the next call goes on where the budget of this one ended. Files lie
in $OUT, else in bench/results, in a folder named after the GPU; `bench/report.py` makes tables of the
latter. Each part runs in a process of its own: a crash, or a case that takes too long, costs that case.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime  # the builtin one from Python 3.11
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import measure
import report
import test_mixer
import test_model
import test_training_speed
import torch
from measure import GPU_CHOICE, Choice

from casvit_kernels import _files, backends, benchmark, testing
from casvit_kernels.backends import Problem, get

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
LARGE = 4_000_000  # elements of x: such cases of the parity part run one at a time
FATAL = 3  # exit status of a process whose GPU context is lost
TOOLS = ("memcheck", "racecheck")
BEHAVIOUR = "tests/test_gpu.py"  # streams, devices, graphs, compilers
# Which part runs when, up to which rank. Parity comes before any speed; then what the goals need.
SCHEDULE = (
    ("parity", 1),
    ("mixer", 1),
    ("training", 1),
    ("behaviour", 1),
    ("sanitizer", 1),
    ("model", 1),
    ("model-training", 1),
    ("parity", 2),
    ("mixer", 2),
    ("training", 2),
    ("model", 2),
    ("model-training", 2),
    ("mixer", 3),
    ("training", 3),
    ("model", 3),
    ("model-training", 3),
)
PARTS = tuple(dict.fromkeys(part for part, _ in SCHEDULE))
AUTOTUNED = "-max-autotune"  # ends the keys of cases that measure nothing else that is compiled
SPEED = ("mixer", "training", "model", "model-training")
LEVELS: dict[str, Any] = {
    "mixer": test_mixer,
    "training": test_training_speed,
    "model": test_model,
    "model-training": test_model,
}


class Item(NamedTuple):
    """One case of a part; rank 1 is run first."""

    key: str
    rank: int
    case: Any
    without: str = ""  # kind of torch.compile that is not measured


class Store:
    """The JSON file of one part. It starts anew where sources, GPU, torch or backend are others."""

    def __init__(self, path: Path, stamp: dict[str, Any]) -> None:
        self.path = path
        try:
            self.document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.document = {}
        self.fresh = self.document.get("stamp") != stamp
        if self.fresh:
            self.document = {"stamp": stamp, "limited": {}, "cases": []}

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        return {case["id"]: case for case in self.document["cases"]}

    def add(self, *cases: dict[str, Any]) -> None:
        self.document["cases"] += cases
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _files.write_text(self.path, json.dumps(self.document, indent=1) + "\n")


@functools.cache
def version() -> str:
    """A hash of what the numbers depend on."""
    files = [*(ROOT / "casvit_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    files = [p for p in files if not {"demo", "export", "cli", "_files.py"} & set(p.parts)]
    digest = hashlib.sha256()
    for path in sorted([*files, ROOT / "bench" / "measure.py"]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def stamp(options: argparse.Namespace) -> dict[str, Any]:
    environment = benchmark.environment(options.device)
    return {
        "version": version(),
        "device": environment.get("gpu", environment["cpu"]),
        "torch": environment["torch"],
        "backend": options.backend,
        "quick": options.quick,
    }


def folder(options: argparse.Namespace, where: Path) -> Path:
    name = options.device
    if name != "cpu":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(name).lower()).strip("-")
    return where / name


def store(part: str, options: argparse.Namespace) -> Store:
    """The part's file; what bench/results has of it is where a new $OUT goes on."""
    name, mine = f"{part}.json", folder(options, options.out)
    path, earlier = mine / name, folder(options, RESULTS) / name
    found = Store(path, stamp(options))
    if found.fresh and earlier != path:
        found.document = Store(earlier, found.document["stamp"]).document
    return found


# What the parts consist of.


def items(part: str, options: argparse.Namespace) -> list[Item]:
    if part == "parity":
        return parity_items(options)
    if part == "behaviour":
        return [Item(BEHAVIOUR, 1, BEHAVIOUR)]
    if part == "sanitizer":
        return [Item(tool, 1, tool) for tool in TOOLS]
    choice = Choice(("xs",), (1,), (224,), True, True) if options.quick else GPU_CHOICE
    cases = [c for c in LEVELS[part].cases(choice) if c.level == part]
    if part in ("mixer", "training"):
        found = [Item(case.id, rank(case), case) for case in cases]
    else:  # autotuning a whole model may take minutes: a case of its own
        found = [Item(case.id, rank(case), case, "max-autotune") for case in cases]
        if not options.quick:  # which compiles nothing
            found += [Item(c.id + AUTOTUNED, max(2, rank(c)), c, "compile") for c in cases]
    return sorted(found, key=lambda item: item.rank)  # stable


def rank(case: measure.Case) -> int:
    """1: what the goals are about. 2: the rest of batch 256 at 224x224."""
    pixels = case.size if case.stage is None else case.size * (2 << case.stage)
    if case.batch != max(GPU_CHOICE.batches) or pixels != GPU_CHOICE.inputs[0]:
        return 3
    if case.stage is None:
        return 1 if case.model == "xs" else 2
    return 1 if case.model in ("xs", "t") and case.stage <= 2 else 2


def parity_items(options: argparse.Namespace) -> list[Item]:
    """The backend under test on the device, real shapes last; then every other usable backend."""
    device, batch = options.device, max(GPU_CHOICE.batches)
    found = [(1, case) for case in testing.cases(options.backend, device=device)]
    if options.quick:
        found = [(r, c) for r, c in found if c.shape == (5, 3, 7, 7)]
    else:
        found += [(1, c) for c in testing.real_cases(options.backend, 2, device=device)]
        for case in testing.real_cases(options.backend, batch, device=device):
            goal = case.dtype is torch.bfloat16 and case.mode != "frozen" and case.shape[2] % 7 == 0
            found.append((1 if goal else 2, case))
        for status in backends():
            name = status.name
            if status.usable and name in testing.BACKENDS and name != options.backend:
                where = device if serves(name, device) else None
                found += [(2, case) for case in testing.cases(name, device=where)]
    keys = (f"{c}-{c.seed}{'-bias' if c.attn_bias else ''}-{c.device}" for _, c in found)
    once = {
        key: Item(key, r, case) for key, (r, case) in reversed([*zip(keys, found, strict=True)])
    }
    return list(once.values())[::-1]


def serves(backend: str, device: str) -> bool:
    problem = Problem(torch.device(device).type, torch.bfloat16)
    return get(backend).why_not(problem) is None


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
    command += [sys.executable, str(Path(__file__)), "--short", "--backend", options.backend]
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
    names = [n for n in measure.names(module, case, gpu=True) if not unwanted & set(n.split())]
    slow = [n for n in names if "max-autotune" in n and item.key in limited]
    settings = measure.settings_for(options.device, options.backend, options.quick)
    found = module.run(case, [n for n in names if n not in slow], settings)
    found.absent |= dict.fromkeys(slow, f"the case was {limited.get(item.key)}")
    gc.collect()
    if options.device != "cpu":
        torch._dynamo.reset()  # gives back the graphs of this case
        torch.cuda.empty_cache()
    return dict(found.as_json())


# The process of one part.


def work(part: str, options: argparse.Namespace) -> int:
    """Run what is left of a part, up to a rank, until it is done or the deadline is near."""
    file = store(part, options)
    settings = measure.settings_for(options.device, options.backend, options.quick)
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
    copy = measure.copy_bandwidth(options.device, options.quick) if part in SPEED and todo else None
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


# The parent: it starts the processes, watches the clock, and says what came out.


def supervise(part: str, rank: int, options: argparse.Namespace) -> None:
    """Start the part's process, again after each crash, until it is through or time is up."""
    with tempfile.TemporaryDirectory() as scratch:
        marker = Path(scratch) / "running"
        file = store(part, options)
        if file.document.pop("problems", None):
            file.save()
        while left_of(part, rank, options):
            marker.unlink(missing_ok=True)
            before = len(store(part, options).done)
            ended, seconds = watch(start(part, rank, marker, options), marker, options)
            if ended == 0 or time.time() > options.deadline:
                return
            running = json.loads(marker.read_text())["key"] if marker.exists() else None
            file = store(part, options)
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
    command = [sys.executable, str(Path(__file__)), "--child", part, "--rank", str(rank)]
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
    return left(part, store(part, options), argparse.Namespace(**{**vars(options), "rank": rank}))


def red(options: argparse.Namespace) -> str | None:
    """Why no speed may be measured yet, or None."""
    done = store("parity", options).done
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


def build_native() -> None:
    """The CPU kernels, where a compiler is; Triton does without."""
    if (ROOT / "casvit_kernels" / "_C.so").exists():
        return
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        said = ["not built within 120 s"]
    built = (ROOT / "casvit_kernels" / "_C.so").exists()
    print("native library:", "built" if built else f"not built; {' '.join(said)}", flush=True)


def run(options: argparse.Namespace) -> int:
    if options.build:
        build_native()
    for name, value in stamp(options).items():
        print(f"{name}: {value}")
    refused: dict[str, str] = {}
    for part, rank in SCHEDULE:
        if part not in options.parts or not left_of(part, rank, options):
            continue
        if time.time() > options.deadline - 1:
            break
        reason = red(options) if part in SPEED else None
        if reason is not None:
            refused[part] = f"no speed: {reason}"
        else:
            print(f"[{time.time() - options.started:4.0f} s] {part}, rank {rank}", flush=True)
            supervise(part, rank, options)
    return conclude(refused, options)


def conclude(refused: dict[str, str], options: argparse.Namespace) -> int:
    """Print what was done and what was not, and the goals. 1 where something is wrong."""
    print(f"[{time.time() - options.started:4.0f} s] results in {folder(options, options.out)}")
    bad = bool(refused)
    for part in options.parts:
        file = store(part, options)
        wanted, done = items(part, options), file.done
        missing = [item for item in wanted if item.key not in done]
        print(f"{part}: {len(wanted) - len(missing)} of {len(wanted)} cases")
        if missing:
            print(f"  not done: {len(missing)}, the next {missing[0].key}; call again to go on")
        problems = list(file.document.get("problems", []))
        problems += [refused[part]] if part in refused else []
        for key, case in done.items():
            text = case.get("error") or case.get("refused") or "; ".join(case.get("failures", ()))
            if text or case.get("passed") is False:
                problems.append(f"{key}: {text or 'failed'}")
            elif "absent" in case:
                print(f"  {key}: not run, {case['absent']}")
        for text in problems[:20]:
            print(f"  {text[:300]}")
        if len(problems) > 20:
            print(f"  and {len(problems) - 20} more")
        bad = bad or bool(problems)
    documents = [] if red(options) else [store(part, options).document for part in SPEED]
    print("goals (bfloat16, batch 256, 224x224 input):")
    for line in report.goal_lines(documents):
        print(f"  {line}")
    return 1 if bad else 0


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=540, help="seconds, default %(default)g")
    parser.add_argument(
        "--case-limit", type=float, default=150, help="seconds for one case, default %(default)g"
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--backend", help="whose speed is measured; default: the first usable one")
    parser.add_argument("--jobs", type=int, help="processes of the parity part, default up to 12")
    parser.add_argument("--quick", action="store_true", help="try the machinery on tiny cases")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    parser.add_argument("--no-build", dest="build", action="store_false")
    for hidden in ("--child", "--rank", "--deadline", "--marker"):
        kind: Callable[[str], Any] = {"--rank": int, "--deadline": float, "--marker": Path}.get(
            hidden, str
        )
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.started = time.time()
    options.deadline = options.deadline or options.started + options.budget
    options.parts = options.parts.split(",")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts: expected names out of {','.join(PARTS)}, got {','.join(unknown)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no GPU")
    usable = [
        status.name
        for status in backends()
        if status.name != "reference" and serves(status.name, options.device)
    ]
    if options.backend is None and not usable:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in backends() if s.reason)
        parser.error(f"--backend: none is usable on {options.device} ({reasons})")
    options.backend = options.backend or usable[0]
    if options.backend not in testing.BACKENDS or not serves(options.backend, options.device):
        expected = ", ".join(usable) or "none"
        parser.error(
            f"--backend: expected one that serves {options.device} ({expected}), got {options.backend}"
        )
    if options.jobs is None:
        options.jobs = 1 if options.device == "cpu" else min(12, os.cpu_count() or 1)
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.short:
        return run_short(options)
    return work(options.child, options) if options.child else run(options)


if __name__ == "__main__":
    sys.exit(main())
