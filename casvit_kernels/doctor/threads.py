"""Threads: how many, on how many CPUs, out of which pools, and who else computes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from .facts import Facts
from .finding import Finding

# A file of an OpenMP runtime, and whose it is: GNU's, Intel's or LLVM's. Wheels add a hash to its name.
_RUNTIME = re.compile(r"lib(gomp|iomp5|omp)(-[0-9a-f]+)?\.so")
_LOADED = 0.5  # of the CPUs: from here timings are not to be trusted


def findings(facts: Facts) -> Iterator[Finding]:
    yield _threads(facts)
    if facts.native.loaded_by_parent:
        yield Finding(
            "fork",
            "note",
            "this process was forked after the native library was loaded: its kernels compute on one "
            "thread",
            "multiprocessing.set_start_method('spawn'), or load models in the worker (gunicorn: no "
            "--preload)",
        )
    if facts.maps is not None:
        yield _runtimes(facts, facts.maps)
    if facts.load is not None:
        yield _load(facts, facts.load)


def is_loaded(facts: Facts) -> bool:
    """Whether the machine is busy, so that timings tell little."""
    return facts.load is not None and facts.load > _LOADED * facts.allowed


def _threads(facts: Facts) -> Finding:
    name, threads, limit = "threads", facts.threads, facts.limit
    where = f"{facts.allowed} of {facts.cpus} CPUs"
    if facts.quota is not None:
        where += f", with a quota of {facts.quota:g} (control group)"
    processes = _processes(facts)
    each = max(1, limit // processes)
    of = f"{processes} processes of torchrun with " if processes > 1 else ""
    found = f"{of}{threads} thread{'s' * (threads != 1)} on {where}"
    remedy = f"export OMP_NUM_THREADS={each}, or torch.set_num_threads({each})"
    if "MKL_NUM_THREADS" in facts.environ:
        remedy = f"unset MKL_NUM_THREADS; {remedy}"
    if threads * processes > limit and threads > 1:
        return Finding(name, "problem", f"{found}: they wait for each other", remedy)
    pinned = [
        n for n in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY") if n in facts.environ
    ]
    if facts.allowed == 1 < facts.cpus and pinned:
        found += f": {pinned[0]} pins this process, and those that it starts"
        return Finding(name, "note", found, f"unset {pinned[0]}")
    if threads == 1 < each:
        if facts.environ.get("OMP_NUM_THREADS") == "1":
            found += ": OMP_NUM_THREADS=1 is set (torchrun sets it where nobody else does)"
        return Finding(name, "note", found, remedy)
    return Finding(name, "ok", found)


def _processes(facts: Facts) -> int:
    """Of torchrun on this machine."""
    number = facts.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(number)) if number.isdecimal() else 1


def _runtimes(facts: Facts, maps: str) -> Finding:
    name = "OpenMP"
    files: dict[str, str] = {}  # and the runtime
    for line in maps.splitlines():
        _, _, path = line.partition("/")
        if match := _RUNTIME.match(PurePath(path).name):
            files.setdefault(f"/{path}", match[1])
    listed = ", ".join(_short(path) for path in files)
    if len(files) < 2:
        return Finding(name, "ok", f"one runtime: {listed}" if files else "no runtime is loaded")
    found = f"{len(files)} runtimes are loaded, each with threads of its own: {listed}"
    if sum(runtime != "gomp" for runtime in files.values()) > 1:
        found += "; two of Intel's or LLVM's in one process may crash or hang"
        if facts.environ.get("KMP_DUPLICATE_LIB_OK"):
            found += " (KMP_DUPLICATE_LIB_OK only silences the error)"
        remedy = "take all packages from one source, all from pip or all from conda-forge"
        return Finding(name, "problem", found, remedy)
    return Finding(
        name,
        "note",
        f"{found}; they compete where both compute at a time",
        "let the other package compute in a process of its own; packages that all come from "
        "conda-forge share one runtime",
    )


def _short(path: str) -> str:
    """Without the user's name, as reports of problems are public."""
    home = str(Path.home())
    return "~" + path.removeprefix(home) if path.startswith(home + "/") else path


def _load(facts: Facts, load: float) -> Finding:
    allowed = facts.allowed
    found = f"{load:.1f} over the last minute, on {allowed} CPU{'s' * (allowed != 1)}"
    if is_loaded(facts):
        found += ": busy, so timings tell little"
        return Finding("load", "note", found, "look at 'top', and time again when it is idle")
    return Finding("load", "ok", found)
