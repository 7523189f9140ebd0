"""Compiles the emulation and the kernels into a Python module, on first use after a change."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_emulation"
NAME = "casvit_cuda_emulation"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # unroll
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
    "-DCASVIT_EMULATED",
]

_failed: dict[Path, str] = {}  # what the compiler said of a module


def compiler() -> str | None:
    """The C++ compiler: CXX, or what is there."""
    given = os.environ.get("CXX")
    return given or shutil.which("g++") or shutil.which("c++")


def why_not() -> str | None:
    """Why the module cannot be built here, or None."""
    if sys.platform != "linux":
        return "the emulation's fibers are for Linux"
    if compiler() is None:
        return "there is no C++ compiler"
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install -e .[test])"
    return None


def sources() -> list[Path]:
    """All that the module is made of."""
    files = [*HERE.iterdir(), *(ROOT / "csrc" / "cuda").iterdir()]
    return sorted(p for p in files if p.suffix in (".h", ".cpp", ".cu"))


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _ninja(units: list[Path], flags: list[str], output: str) -> str:
    quoted = " ".join(flags)
    lines = [
        f"flags = {quoted}",
        "rule compile",
        f"  command = {compiler()} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -shared $in -o $out",
        *(f"build {p.stem}.o: compile {p}" for p in units),
        f"build {output}: link {' '.join(p.stem + '.o' for p in units)}",
        "",
    ]
    return "\n".join(lines)


def build() -> Path:
    """The module's file; compiled if there is none of these sources and this compiler."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the CUDA emulation cannot be built: {reason}")
    import fcntl

    import pybind11

    cxx = compiler()
    assert cxx is not None
    includes = [HERE, ROOT / "csrc", ROOT / "csrc" / "cuda"]
    system = [sysconfig.get_paths()["include"], pybind11.get_include()]
    flags = [*FLAGS, *(f"-I{p}" for p in includes), *(f"-isystem {p}" for p in system)]
    version = subprocess.run([cxx, "--version"], capture_output=True, check=True).stdout
    tools = [version, " ".join([cxx, *flags]).encode(), pybind11.__version__.encode()]
    content = [part for p in sources() for part in (str(p).encode(), p.read_bytes())]
    module_file = BUILD / f"{_digest(tools + content)}.so"
    if module_file.exists():
        return module_file
    if module_file in _failed:  # each test would compile it again
        raise RuntimeError(_failed[module_file])

    # Objects stay, for a build after a change to one file; one process at a time.
    folder = BUILD / _digest(tools)
    folder.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if module_file.exists():
            return module_file
        output = f"{NAME}.so"
        units = sorted(HERE.glob("*.cpp"))
        (folder / "build.ninja").write_text(_ninja(units, flags, output))
        result = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True
        )
        if result.returncode:
            _failed[module_file] = f"the CUDA emulation does not compile:\n{result.stdout}"
            raise RuntimeError(_failed[module_file])
        partial = module_file.with_suffix(f".{os.getpid()}")
        shutil.copy2(folder / output, partial)
        os.replace(partial, module_file)
    return module_file


@functools.cache
def module() -> ModuleType:
    """The compiled module."""
    spec = importlib.util.spec_from_file_location(NAME, build())
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
