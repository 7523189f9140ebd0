"""The JSON file of each part, and what its results belong to: sources, GPU, torch, backend."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from bench.harness.case import settings_for
from casvit_kernels import _files, benchmark

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
# No number depends on these; the last is made of such numbers.
NO_PART = {"demo", "doctor", "export", "cli", "_files.py", "gpu_numbers.py"}
UNFINISHED = "unfinished"  # marks a case that some of its candidates are missing in


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
            self.document = {"stamp": stamp, "cases": []}

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        return {case["id"]: case for case in self.document["cases"] if UNFINISHED not in case}

    @property
    def progress(self) -> int:
        """Grows with every case and candidate, and where one of them goes wrong after all."""
        rows = [row for case in self.document["cases"] for row in case.get("rows", ())]
        return len(self.done) + len(rows) + sum("error" in row for row in rows)

    def begun(self, key: str) -> dict[str, Any] | None:
        """What there is of a case that is not done."""
        cases = [c for c in self.document["cases"] if c["id"] == key and UNFINISHED in c]
        return dict(cases[0]) if cases else None

    def add(self, *cases: dict[str, Any]) -> None:
        """Cases that are done; also in place of what there was of them."""
        mine = {case["id"] for case in cases}
        kept = [c for c in self.document["cases"] if c["id"] not in mine or UNFINISHED not in c]
        self.document["cases"] = [*kept, *cases]
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _files.write_text(self.path, json.dumps(self.document, indent=1) + "\n")


def sources() -> list[str]:
    """Paths of those files, from the root: kernels, what calls and judges them, and the harness."""
    folders = (("casvit_kernels", "*.py"), ("csrc", "*.*"), ("bench/harness", "*.py"))
    found = [p for folder, pattern in folders for p in (ROOT / folder).rglob(pattern)]
    names = (p.relative_to(ROOT) for p in found if p.suffix != ".md")
    return sorted(p.as_posix() for p in names if not NO_PART & set(p.parts))


@functools.cache
def version() -> str:
    """A hash of what the numbers depend on."""
    digest = hashlib.sha256()
    for name in sources():
        digest.update(name.encode() + (ROOT / name).read_bytes())
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


def load(part: str, options: argparse.Namespace) -> Store:
    """The part's file; what bench/results has of it is where a new $OUT goes on."""
    name, mine = f"{part}.json", folder(options, options.out)
    path, earlier = mine / name, folder(options, RESULTS) / name
    found = Store(path, stamp(options))
    if found.fresh and earlier != path:
        found.document = Store(earlier, found.document["stamp"]).document
    return found


def open_to_write(part: str, options: argparse.Namespace) -> Store:
    """As `load`, with where and how the part's process measures."""
    file = load(part, options)
    settings = settings_for(options.device, options.backend, options.quick)
    environment = benchmark.environment(options.device)
    file.document |= {"part": part, "environment": environment, "settings": vars(settings)}
    return file
