"""PyTorch's version, and the native library: there, loaded, of this version, and the one meant."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..backends import native
from .facts import Facts
from .finding import Finding
from .variables import ISA

OLDEST, TOO_NEW = (2, 11), (2, 16)  # of torch, as pyproject.toml has them
_REBUILD = "in the source tree run 'make setup' or 'python setup.py build_ext --inplace'"


def findings(facts: Facts) -> Iterator[Finding]:
    yield _torch(facts.torch)
    yield _native(facts)


def _torch(version: str) -> Finding:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) < TOO_NEW:
        return Finding("torch", "ok", version)
    oldest, too_new = (".".join(map(str, v)) for v in (OLDEST, TOO_NEW))
    return Finding(
        "torch",
        "problem",
        f"{version}; expected {oldest} or later, below {too_new}",
        f"pip install 'torch>={oldest},<{too_new}'",
    )


def _native(facts: Facts) -> Finding:
    name, library = "native library", facts.native
    if library.why_not is not None:
        found = library.why_not.removesuffix(f": {native.REMEDY}")
        remedy = native.REMEDY
        if library.why_not.startswith(ISA):
            remedy = f"unset {ISA}"
        elif facts.elsewhere is not None:
            found += f"; an installed one is in {facts.elsewhere}"
            remedy = "run Python outside of the source tree, whose package was imported instead"
        return Finding(name, "problem", found, remedy)
    if not library.same_weights:
        found = "of another version than this package: the order of weights differs"
        return Finding(name, "problem", found, _REBUILD)
    if library.sources_newer:
        found = f"built by {library.compiler}; sources beside it are newer"
        return Finding(name, "note", found, f"if they were changed or pulled, {_REBUILD}")
    return Finding(name, "ok", f"built by {library.compiler}")
