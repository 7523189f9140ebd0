"""Looks into wheels and source distributions before they are released.

    python release/audit.py dist/*.whl dist/*.tar.gz
    python release/audit.py dist/*.whl --json

Of a wheel: its tags, that the native library uses torch's stable functions alone (release/abi.py), names
no folder to search, and needs no library but torch's and the system's; that it holds the package, its
licence and nothing else. Of a source distribution: that everything is there to build and to read. Sizes
and SHA-256 are printed. Exit status 1 where something is wrong. Needs torch (its headers) and binutils.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import abi
import mach_o

LIBRARY = "casvit_kernels/_C.so"
# From the system, by their names up to the version.
NEEDED = {
    "libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl", "librt", "ld-linux",
}  # fmt: skip
NEEDED_ON_MACOS = re.compile(r"/usr/lib/.*|@rpath/libtorch_cpu\.dylib")
SOURCES = (
    "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "csrc/CMakeLists.txt",
    "csrc/cuda/toolkit.txt", "casvit_kernels/__init__.py", "casvit_kernels/py.typed", "docs/start.md",
    "examples/serve.py",
)  # fmt: skip


def audit(path: Path, include: Path) -> dict[str, Any]:
    """What is in a file, and what is wrong with it."""
    data = path.read_bytes()
    found: dict[str, Any] = {
        "file": path.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        found |= of_wheel(path, include) if path.suffix == ".whl" else of_sources(path)
    except (ValueError, RuntimeError, zipfile.BadZipFile, tarfile.TarError) as error:
        found |= {"version": None, "wrong": [f"cannot be read: {error}"]}
    return found


def of_wheel(path: Path, include: Path) -> dict[str, Any]:
    wrong = []
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        metadata = next((n for n in names if n.endswith(".dist-info/METADATA")), None)
        if metadata is None:
            raise ValueError("it has no METADATA")
        info = metadata.removesuffix("METADATA")
        about = email.message_from_bytes(archive.read(metadata))
        library = archive.read(LIBRARY) if LIBRARY in names else None
    parts = path.stem.split("-")
    if len(parts) not in (5, 6):  # with a build number
        raise ValueError("its name is none of a wheel")
    tags = parts[-3:]
    if tags[:2] != ["py3", "none"] or tags[2] == "any":
        wrong.append(f"tags: expected py3-none-PLATFORM, got {'-'.join(tags)}")
    for name in names:
        if not name.startswith((info, "casvit_kernels/")) or "__pycache__" in name:
            wrong.append(f"does not belong in a wheel: {name}")
    if f"{info}licenses/LICENSE" not in names:
        wrong.append("its licence is missing")
    facts: dict[str, Any] = {"version": about["Version"], "platform": tags[2]}
    if library is None:
        wrong.append(f"{LIBRARY} is missing: built without a compiler?")
    else:
        of_library, more = _library(library, _oldest_torch(about), include)
        facts |= of_library
        wrong += more
    return {**facts, "wrong": wrong}


def _oldest_torch(about: email.message.Message) -> tuple[int, int]:
    for line in about.get_all("Requires-Dist") or ():
        if line.startswith("torch") and (found := re.search(r">=(\d+)\.(\d+)", line)):
            return int(found[1]), int(found[2])
    raise ValueError("it does not say from which torch on it works")


def _library(
    data: bytes, oldest: tuple[int, int], include: Path
) -> tuple[dict[str, Any], list[str]]:
    stable = abi.declared(include, oldest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "_C.so")
        path.write_bytes(data)
        symbols, macos = abi.undefined(path), abi.is_mach_o(path)
        needed, search = _dynamic(path)
    used = sorted(n for s in symbols if (n := s.removeprefix("_")) in stable or s in stable)
    unstable = abi.unstable(symbols, stable, mach_o=macos)
    wrong = [f"not of torch {oldest[0]}.{oldest[1]}'s stable ABI: {s}" for s in unstable]
    wrong += [f"searches a folder of the machine it was built on: {s}" for s in search]
    for name in needed:
        known = NEEDED_ON_MACOS.fullmatch(name) if macos else _stem(name) in NEEDED
        if not known:
            wrong.append(f"needs a library that users may not have: {name}")
    facts = {
        "library_bytes": len(data),
        "cuda_kernels": b"casvit_cuda_architectures" in data,
        "oldest_torch": ".".join(map(str, oldest)),
        "stable_functions_used": len(used),
    }
    if not used:
        wrong.append("it uses no function of torch: is it the library?")
    return facts, wrong


def _dynamic(path: Path) -> tuple[list[str], list[str]]:
    """The libraries that a library needs, and the folders that it searches."""
    if abi.is_mach_o(path):
        asked = mach_o.asked(path.read_bytes())
        return asked.libraries, asked.folders
    done = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)
    return needed, re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", done.stdout)


def _stem(name: str) -> str:
    """Of an ELF library's name, without its version."""
    return re.split(r"\.so|-x86|-aarch64", name)[0]


def of_sources(path: Path) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wrong = [f"missing: {name}" for name in SOURCES if name not in names]
    built = [
        n for n in names if n.endswith((".so", ".o", ".pyc")) or n.startswith(("build/", ".venv"))
    ]
    wrong += [f"does not belong in a source distribution: {name}" for name in sorted(built)]
    version = path.name.removesuffix(".tar.gz").rpartition("-")[2]
    return {"version": version, "files": len(names), "wrong": wrong}


def text(found: dict[str, Any]) -> str:
    size = f"{found['bytes'] / 2**20:.1f} MiB"
    lines = [f"{found['file']}  {size}  sha256:{found['sha256']}"]
    for name in ("platform", "oldest_torch", "stable_functions_used", "cuda_kernels", "files"):
        if name in found:
            lines.append(f"  {name.replace('_', ' ')}: {found[name]}")
    return "\n".join(lines + [f"  WRONG: {fault}" for fault in found["wrong"]])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="wheels and source distributions")
    parser.add_argument("--json", action="store_true", help="one JSON list on stdout")
    arguments = parser.parse_args(argv)
    for path in arguments.files:
        if not path.is_file() or not path.name.endswith((".whl", ".tar.gz")):
            parser.error(f"files: expected wheels or .tar.gz files that are there, got {path}")
    from torch.utils.cpp_extension import include_paths

    rows = [audit(path, Path(include_paths()[0])) for path in arguments.files]
    versions = [row["version"] for row in rows if row["version"] is not None]
    if len({version.partition("+")[0] for version in versions}) > 1:
        rows[0]["wrong"].append(f"other versions beside it: {versions}")
    print(json.dumps(rows, indent=1) if arguments.json else "\n".join(map(text, rows)))
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
