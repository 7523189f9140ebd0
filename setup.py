"""Builds csrc/ into casvit_kernels/_C.so, one library for every supported torch.

The library uses torch's stable ABI only and links libtorch_cpu only, so a wheel built with one
torch runs with any other from 2.11 on, CPU or CUDA build alike, and with any Python 3.
Without a C++ compiler the install succeeds without it; the package then says so when used. An
instruction set that the compiler is too old for is left out; `casvit-kernels info` says so.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest supported
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
SOURCES = [
    "csrc/bindings/infer.cpp",
    "csrc/bindings/info.cpp",
    "csrc/bindings/train.cpp",
    "csrc/bindings/train_step.cpp",
    "csrc/cpu/infer.cpp",
    "csrc/cpu/fingerprint.cpp",
    "csrc/cpu/k_scale.cpp",
    "csrc/cpu/pack.cpp",
    "csrc/cpu/pack_train.cpp",
    "csrc/cpu/packed_layout.cpp",
    "csrc/cpu/sources.cpp",
    "csrc/cpu/train.cpp",
    "csrc/cpu/train_backward.cpp",
    "csrc/cpu/train_qkv.cpp",
    "csrc/cpu/isa/portable.cpp",
]
CHOICE = "csrc/cpu/dispatch.cpp"  # compiled last: it is told which instruction sets there are
# csrc/cpu/isa/<set>.cpp, each built upon those before it.
X86_SETS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}


def native_is_required() -> bool:
    return os.environ.get("CASVIT_KERNELS_REQUIRE_NATIVE") == "1"


def say(text: str) -> None:
    print(f"casvit_kernels: {text}", file=sys.stderr)


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python in it, so no Python tag

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        reason = self._compile(target)
        if reason is None:
            return
        if native_is_required():
            raise RuntimeError(reason)
        target.unlink(missing_ok=True)
        say(reason)
        say(
            "installing without the native library; the mixer will run on its plain PyTorch "
            "reference path."
        )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:  # what did not build now must not survive from an earlier build
            if not os.path.exists(os.path.join(self.build_lib, ext._file_name)):
                (ROOT / ext._file_name).unlink(missing_ok=True)

    def _compile(self, target: Path) -> str | None:
        """Build the library; the reason why not, or None."""
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            return f"the native library needs torch at build time: {error}"
        compiler = os.environ.get("CXX", "c++").split()
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        flags += ["-Icsrc"]
        # GCC 12's own AVX-512 headers trip these two.
        flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
        flags += os.environ.get("CXXFLAGS", "").split()
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for path in include_paths():
            flags += ["-isystem", path]
        temporary = Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        def run(command: list[str]) -> None:
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)

        def compile_one(source: str, extra: Iterable[str] = ()) -> str:
            name = source.removeprefix("csrc/").replace("/", "-").replace(".cpp", ".o")
            out = str((temporary / name).resolve())
            run([*compiler, *flags, *extra, "-c", source, "-o", out])
            return out

        def knows(extra: list[str]) -> bool:
            try:
                run([*compiler, *extra, "-x", "c++", "-E", os.devnull])
            except subprocess.CalledProcessError:
                return False
            return True

        try:
            with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
                sets = {
                    name: pool.submit(compile_one, f"csrc/cpu/isa/{name}.cpp", extra)
                    for name, extra in (X86_SETS.items() if x86 else ())
                }
                # First: of what every source has, the linker takes the one that any CPU can run.
                objects = list(pool.map(compile_one, SOURCES))
            built: list[str] = []
            for name, result in sets.items():
                try:
                    objects.append(result.result())
                except subprocess.CalledProcessError as error:
                    if native_is_required() and knows(X86_SETS[name]):
                        raise  # a fault of the source, not of the compiler's age
                    missing = ", ".join(n for n in sets if n not in built)
                    why = next((x for x in error.stderr.splitlines() if "error" in x), error.stderr)
                    say(f"building without {missing}, which this compiler cannot: {why}")
                    break
                built.append(name)
            objects.append(compile_one(CHOICE, [f"-DCASVIT_HAVE_{n.upper()}" for n in built]))
            link = ["-shared", "-pthread", *(f"-L{path}" for path in library_paths())]
            if sys.platform == "darwin":
                link += ["-undefined", "dynamic_lookup"]
            # Moved into place when whole: an interrupted build leaves no half file.
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                library = Path(scratch) / target.name
                run([*compiler, *objects, *link, "-ltorch_cpu", "-o", str(library.resolve())])
                os.replace(library, target)
        except FileNotFoundError:
            return f"no C++ compiler found ({compiler[0]!r} is not there; CXX names another)"
        except subprocess.CalledProcessError as error:
            return f"the native library did not build:\n{' '.join(error.cmd)}\n{error.stderr}"
        return None


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on this platform, also when the library in it is missing."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    # Optional: an install without the library is complete.
    ext_modules=[Extension("casvit_kernels._C", [*SOURCES, CHOICE], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
