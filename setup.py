"""Builds csrc/ into casvit_kernels/_C.so with CMake and Ninja; how is in csrc/CMakeLists.txt.

The library uses torch's stable ABI only and links libtorch_cpu only, so a wheel built with one
torch runs with any other from 2.11 on, CPU or CUDA build alike, and with any Python 3.
Without a C++ compiler, CMake or Ninja the install succeeds without it; the package then says so when
used. An instruction set that the compiler is too old for is left out; `casvit-kernels info` says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def native_is_required() -> bool:
    return os.environ.get("CASVIT_KERNELS_REQUIRE_NATIVE") == "1"


def say(text: str) -> None:
    print(f"casvit_kernels: {text}", file=sys.stderr)


class NotBuilt(Exception):
    """The reason why there is no library."""


def tool(name: str) -> str:
    """The environment's own, which pip installs, else the one on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise NotBuilt(f"the native library is built with CMake and Ninja, and there is no {name}")
    return found


def run(*command: str) -> str:
    """What it printed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        raise NotBuilt(f"the native library did not build:\n{said}")
    return done.stdout + done.stderr


def nvcc() -> str:
    """The CUDA compiler: that of CUDA_HOME, of `make cuda`, or on PATH; empty where none is.

    CASVIT_KERNELS_CUDA=0 builds without CUDA kernels whatever there is, =1 not without them.
    """
    wanted = os.environ.get("CASVIT_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"CASVIT_KERNELS_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    found = "" if wanted == "0" else find_nvcc()
    if wanted == "1" and not found:
        raise NotBuilt("CASVIT_KERNELS_CUDA=1, and there is no nvcc ('make cuda' installs one)")
    return found


def find_nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), ROOT / "build" / "cuda-toolkit" / "nvidia" / "cu13"]
    places = [Path(home, "bin") for home in homes if home] + [Path("/usr/local/cuda/bin")]
    for place in places:
        if found := shutil.which("nvcc", path=str(place)):
            return found
    return shutil.which("nvcc") or ""


def compile_library(folder: Path) -> Path:
    """The library, built in a folder that is kept: what has not changed is not compiled again."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise NotBuilt(f"the native library needs torch at build time: {error}") from error
    compiler = os.environ.get("CXX", "c++").split()
    if not compiler or shutil.which(compiler[0]) is None:
        raise NotBuilt(
            f"no C++ compiler found ({''.join(compiler[:1])!r} is not there; CXX names another)"
        )
    cmake, ninja = tool("cmake"), tool("ninja")
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CASVIT_TORCH_INCLUDE": ";".join(include_paths()),
        "CASVIT_TORCH_LIB": ";".join(library_paths()),
        "CASVIT_NVCC": nvcc(),
        "CASVIT_REQUIRE_NATIVE": "ON" if native_is_required() else "OFF",
    }
    # CMake keeps the compiler and its flags of the first time: where these change, it starts anew.
    made_with = json.dumps(
        [str(ROOT), run(cmake, "--version"), run(*compiler, "--version"), compiler]
        + [os.environ.get(name) for name in ("CXXFLAGS", "LDFLAGS")]
    )
    stamp = folder / "made_with.json"
    if not stamp.exists() or stamp.read_text() != made_with:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    defined = [f"-D{name}={value}" for name, value in options.items()]
    said = run(cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", *defined)
    stamp.write_text(made_with)
    for line in said.splitlines():
        if line.startswith("casvit_kernels: "):
            print(line, file=sys.stderr)
    # A compiler takes up to 500 MB: not one for each of many cores, unless asked.
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(min(4, os.cpu_count() or 1))
    run(cmake, "--build", str(folder), "--parallel", jobs)
    return folder / "_C.so"


class BuildNative(build_ext):
    def finalize_options(self) -> None:
        if self.build_temp is None:
            self.build_temp = str(ROOT / "build")
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python in it, so no Python tag

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            library = compile_library(Path(self.build_temp).resolve() / "native")
        except NotBuilt as reason:
            if native_is_required():
                raise
            target.unlink(missing_ok=True)
            say(str(reason))
            say(
                "installing without the native library; the mixer will run on its plain PyTorch "
                "reference path."
            )
            return
        # Moved into place when whole: an interrupted build leaves no half file.
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            copy = shutil.copy(library, scratch)
            os.replace(copy, target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:  # what did not build now must not survive from an earlier build
            if not os.path.exists(os.path.join(self.build_lib, ext._file_name)):
                (ROOT / ext._file_name).unlink(missing_ok=True)


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on this platform, also when the library in it is missing."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    # Optional: an install without the library is complete. Its sources are for CMake to know.
    ext_modules=[Extension("casvit_kernels._C", [], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
