"""Building and installing: one wheel for every torch, and an install without a compiler."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Another torch than the one the tests run with; on Linux wheels this small exist for the CPU only.
OTHER_TORCH = os.environ.get("CASVIT_KERNELS_OTHER_TORCH", "torch==2.13.0")

# The oldest torch, with its triton; the interpreter of that one needs a numpy of its time.
OLDEST_TORCH = ("torch==2.11.0", "numpy<2.4")

USE = """
import warnings, torch, casvit_kernels as c
warnings.simplefilter("always")
mixer, x = c.FusedCATM(8).eval(), torch.randn(1, 8, 5, 5)
with warnings.catch_warnings(record=True) as caught:
    mixer(x); mixer(x)
print(len(caught), [str(w.message) for w in caught])
print([b.reason for b in c.backends() if b.name == "cpu"][0])
try:
    c.FusedCATM(8, backend="cpu").eval()(x)
except c.BackendUnavailable as error:
    print("refused:", error)
"""


# Folded twice, and exported with all checks.
EXPORT = """
import json, sys, torch, casvit_kernels as c
from casvit_kernels.export import to_onnx
from casvit_kernels.models import Config, RCViT
model = RCViT(Config((1, 1, 1, 1), (8, 8, 16, 16)), num_classes=5).eval()
c.fuse(model)
folded = c.fold_for_inference(c.fold_for_inference(model))
x = torch.randn(2, 3, 64, 64)
with torch.no_grad(), c.use_backend("reference"):
    error = (folded(x) - model(x)).abs().max().item()
print(json.dumps([error, to_onnx(model, sys.argv[1], 64, batch="dynamic").max_error]))
"""


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(tmp_path: Path, **env: str) -> Path:
    """A wheel of a clean copy of the sources, built with the torch that is running."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("casvit_kernels", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    out = tmp_path / "wheel"
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    run(*pip, "--wheel-dir", out, copy, env=env, cwd=tmp_path)
    (wheel,) = out.iterdir()
    return wheel


def build(out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", out, "-t", out],
        cwd=ROOT,
        env={**os.environ, "CASVIT_KERNELS_REQUIRE_NATIVE": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_a_wheel_built_with_one_torch_passes_parity_under_another(tmp_path: Path) -> None:
    version = OTHER_TORCH.partition("==")[2]
    if torch.__version__.startswith(version):
        pytest.skip(f"torch {version} is the one that runs: set CASVIT_KERNELS_OTHER_TORCH")
    wheel = build_wheel(tmp_path, CASVIT_KERNELS_REQUIRE_NATIVE="1")
    assert "-py3-none-" in wheel.name
    other = tmp_path / "venv"
    venv.create(other, with_pip=True)
    python = other / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", OTHER_TORCH, wheel, cwd=tmp_path)
    parity = "-m", "casvit_kernels", "parity", "--backend", "cpu", "--json"
    report = json.loads(run(python, *parity, cwd=tmp_path))
    # Said by the very process that ran it.
    assert report["environment"]["torch"].startswith(version)
    assert report["backend"] == "cpu"
    assert report["passed"]
    assert len(report["rows"]) > 100


INTERPRET = """
import json, torch, triton
from casvit_kernels import testing
rows = [testing.check(case) for case in testing.cases("triton")[::5]]
failures = [[str(r[:5]), r.failures] for r in rows if not r.passed]
print(json.dumps([torch.__version__, triton.__version__, len(rows), failures]))
"""


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch brings triton on x86-64")
def test_the_oldest_torch_and_its_triton(tmp_path: Path) -> None:
    """Parity of the CPU's kernels and, in the interpreter, of Triton's; folding, ONNX, the demo."""
    if torch.__version__.startswith("2.11"):
        pytest.skip("it is the one that runs")
    wheel = build_wheel(tmp_path, CASVIT_KERNELS_REQUIRE_NATIVE="1")
    other = tmp_path / "venv"
    venv.create(other, with_pip=True)
    python = other / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *OLDEST_TORCH, f"{wheel}[demo]", cwd=tmp_path)
    parity = "-m", "casvit_kernels", "parity", "--backend", "cpu", "--dtype", "float32", "--json"
    assert json.loads(run(python, *parity, cwd=tmp_path))["passed"]
    said = run(python, "-c", INTERPRET, env={"TRITON_INTERPRET": "1"}, cwd=tmp_path)
    torch_version, triton_version, count, failures = json.loads(said.splitlines()[-1])
    assert torch_version.startswith("2.11")
    assert triton_version.startswith("3.6")
    assert count >= 8
    assert failures == []
    errors = json.loads(
        run(python, "-c", EXPORT, tmp_path / "m.onnx", cwd=tmp_path).splitlines()[-1]
    )
    assert max(errors) < 1e-5
    run(python, "-m", "casvit_kernels", "doctor", "--quick", cwd=tmp_path)
    demo = ("demo", "--quick", "--output", tmp_path / "report.html", "--json")
    shown = json.loads(run(python, "-m", "casvit_kernels", *demo, cwd=tmp_path))
    assert shown["environment"]["torch"].startswith("2.11")
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.long
def test_without_a_compiler_the_package_installs_and_says_what_is_missing(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX="/no/such/compiler", CASVIT_KERNELS_REQUIRE_NATIVE="0")
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        archive.extractall(tmp_path / "site")
    said = run(
        sys.executable,
        "-c",
        USE,
        env={"PYTHONPATH": str(tmp_path / "site"), "CASVIT_KERNELS_REQUIRE_NATIVE": "0"},
        cwd=tmp_path,
    )
    warned, reason, refused = said.splitlines()
    assert warned.startswith("1 ")
    assert "install a C++17 compiler" in warned
    assert "was not built" in reason
    assert "was not built" in refused.removeprefix("refused:")


def old_compiler(folder: Path, unknown: str) -> Path:
    """The compiler, but it does not know one of its options: as a version from before that."""
    path = folder / "old-compiler"
    path.write_text(
        f"#!/bin/sh\n"
        f'case " $* " in *" {unknown} "*)\n'
        f"  echo 'c++: error: unrecognized command-line option {unknown}' >&2; exit 1;;\n"
        f"esac\n"
        f'exec {os.environ.get("CXX", "c++")} "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have one instruction set")
@pytest.mark.parametrize(
    ("unknown", "missing"),
    [("-mamx-tile", {"amx"}), ("-mavx512f", {"amx", "avx512_bf16", "avx512"})],
)
def test_an_old_compiler_builds_the_instruction_sets_it_knows(
    tmp_path: Path, unknown: str, missing: set[str]
) -> None:
    wheel = build_wheel(
        tmp_path,
        CXX=str(old_compiler(tmp_path, unknown)),
        CXXFLAGS="-O0",
        CASVIT_KERNELS_REQUIRE_NATIVE="1",
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    site = {"PYTHONPATH": str(tmp_path / "site"), "CASVIT_KERNELS_CPU_ISA": ""}
    said = run(sys.executable, "-m", "casvit_kernels", "info", "--json", env=site, cwd=tmp_path)
    sets = json.loads(said)["instruction_sets"]
    assert set(sets) == {"amx", "avx512_bf16", "avx512", "avx2", "portable"}
    assert {n for n, reason in sets.items() if "not in this build" in (reason or "")} == missing
    # The reason is of the build, and refuses what is asked for; the best of the others computes.
    compute = (
        "import torch, casvit_kernels as c\n"
        "from casvit_kernels.backends import cpu\n"
        "c.FusedCATM(8, backend='cpu').eval()(torch.randn(1, 8, 5, 5))\n"
        "print(cpu.active_instruction_set())\n"
    )
    best = next(n for n, reason in sets.items() if reason is None)
    assert run(sys.executable, "-c", compute, env=site, cwd=tmp_path).strip() == best
    forced = subprocess.run(
        [sys.executable, "-c", compute],
        cwd=tmp_path,
        env={**os.environ, **site, "CASVIT_KERNELS_CPU_ISA": "amx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert forced.returncode != 0
    assert "not in this build: the compiler was too old" in forced.stderr


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have one instruction set")
def test_a_fault_in_one_instruction_set_is_not_taken_for_an_old_compiler(tmp_path: Path) -> None:
    """The compiler knows the options of AVX-512 here, and yet its file does not compile."""
    broken = tmp_path / "compiler"
    broken.write_text(
        "#!/bin/sh\n"
        'case "$*" in *isa/avx512.cpp*) echo "error: a fault" >&2; exit 1;; esac\n'
        f'exec {os.environ.get("CXX", "c++")} "$@"\n'
    )
    broken.chmod(0o755)
    done = build(tmp_path, CXX=str(broken), CXXFLAGS="-O0")
    assert done.returncode != 0
    assert "a fault" in done.stderr
    assert "isa/avx512.cpp" in done.stderr


def test_a_compiler_error_stops_a_build_that_requires_the_native_library(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="/no/such/compiler")
    assert done.returncode != 0
    assert "no C++ compiler found ('/no/such/compiler'" in done.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("yes", "CASVIT_KERNELS_CUDA: expected 0, 1 or nothing, got 'yes'"),
        ("1", "there is no nvcc"),
    ],
)
def test_what_is_asked_of_cuda_is_done_or_refused(tmp_path: Path, asked: str, said: str) -> None:
    """With a source tree, a PATH and a CUDA_HOME that have no nvcc."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    code = (
        "import shutil, runpy; shutil.which = lambda *a, **k: None; import setuptools;"
        "setuptools.setup = lambda **k: None; runpy.run_path('setup.py')['nvcc']()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "CASVIT_KERNELS_CUDA": asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr


def without(tmp_path: Path, name: str) -> dict[str, str]:
    """An environment in which a tool is nowhere to be found."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for other in {"c++", "cmake", "ninja"} - {name}:
        found = shutil.which(other, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert found is not None
        (tools / other).symlink_to(found)
    python = f"import sysconfig; sysconfig.get_path = lambda *a, **k: {str(tools)!r}"
    (tmp_path / "sitecustomize.py").write_text(python)
    return {"PATH": str(tools), "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("name", ["cmake", "ninja"])
def test_without_a_build_tool_the_reason_is_said(tmp_path: Path, name: str) -> None:
    env = without(tmp_path, name)
    done = build(tmp_path, **env)
    assert done.returncode != 0
    assert f"there is no {name}" in done.stderr
    done = build(tmp_path, CASVIT_KERNELS_REQUIRE_NATIVE="0", **env)
    assert done.returncode == 0
    assert f"there is no {name}" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.long
def test_a_build_is_incremental_and_links_what_any_cpu_can_run_first(tmp_path: Path) -> None:
    """Of an inline function in several objects the linker takes the first: it must not be AVX's."""
    assert build(tmp_path, CXXFLAGS="-O0").returncode == 0
    folder = tmp_path / "native"
    (link,) = [
        line
        for line in (folder / "build.ninja").read_text().splitlines()
        if line.startswith("build _C.so:")
    ]
    objects = [word for word in link.split() if word.endswith(".o")]
    sets = [o for o in objects if "/isa/" in o and "portable" not in o]
    assert objects[len(objects) - len(sets) :] == sets
    assert json.loads((folder / "compile_commands.json").read_text())
    before = {o: (folder / o).stat().st_mtime_ns for o in objects}
    changed = ROOT / "csrc" / "cpu" / "k_scale.h"
    os.utime(changed)
    assert build(tmp_path, CXXFLAGS="-O0").returncode == 0
    after = {o: (folder / o).stat().st_mtime_ns for o in objects}
    compiled = {Path(o).name for o in objects if before[o] != after[o]}
    assert compiled == {"k_scale.cpp.o", "packed_layout.cpp.o", "train_qkv.cpp.o"}
    # Other flags: everything anew.
    assert build(tmp_path, CXXFLAGS="-O0 -DOTHER").returncode == 0
    assert all((folder / o).stat().st_mtime_ns > after[o] for o in objects)
