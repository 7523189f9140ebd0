"""Building and installing: one wheel for every torch, and an install without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Another torch than the one the tests run with; on Linux wheels this small exist for the CPU only.
OTHER_TORCH = os.environ.get("CASVIT_KERNELS_OTHER_TORCH", "torch==2.13.0")

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


@pytest.mark.slow
def test_a_wheel_built_with_one_torch_passes_parity_under_another(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CASVIT_KERNELS_REQUIRE_NATIVE="1")
    assert "-py3-none-" in wheel.name
    other = tmp_path / "venv"
    venv.create(other, with_pip=True)
    python = other / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", OTHER_TORCH, wheel, cwd=tmp_path)
    versions = run(python, "-c", "import torch; print(torch.__version__)", cwd=tmp_path)
    assert versions.startswith(OTHER_TORCH.partition("==")[2])
    report = run(
        python, "-m", "casvit_kernels", "parity", "--backend", "cpu", "--json", cwd=tmp_path
    )
    assert '"passed"' in report


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


def test_a_compiler_error_stops_a_build_that_requires_the_native_library(tmp_path: Path) -> None:
    env = {**os.environ, "CXX": "/no/such/compiler", "CASVIT_KERNELS_REQUIRE_NATIVE": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "-t", tmp_path],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no C++ compiler found ('/no/such/compiler'" in done.stderr
