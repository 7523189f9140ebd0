"""What of torch a native library uses, against what torch promises to keep.

torch's stable ABI is the C functions that two of its headers declare, each with the version since which
it is there. A library that uses these alone loads with every torch from that version on.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import mach_o

HEADERS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
_GUARD = re.compile(r"TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)_\d+")
_DECLARED = re.compile(r"\bAOTI_TORCH_EXPORT\b[^;{(]*?\b(\w+)\s*\(")
_OF_TORCH = re.compile(r"_?_Z\w*?(2at|3c10|5torch|6caffe2)")  # mangled names in its C++ namespaces
_OURS = ("torch_", "aoti_torch_", "Py", "_Py")  # that torch and Python export as C functions


def declared(include: Path, oldest: tuple[int, int]) -> set[str]:
    """The stable functions that a torch of version `oldest` has, by the headers of a later one."""
    names: set[str] = set()
    for header in HEADERS:
        text = (include / header).read_text(encoding="utf-8")
        names |= set(_DECLARED.findall(_since(_without_comments(text), oldest)))
    return names


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def _since(text: str, oldest: tuple[int, int]) -> str:
    """Without the lines that are for later versions. Conditions on anything else are taken as true."""
    kept, shown = [], [True]
    for line in text.splitlines():
        word = line.replace("#", "# ").split()[:2]
        if word[:1] != ["#"]:
            if all(shown):
                kept.append(line)
        elif word[1].startswith("if"):
            guard = _GUARD.search(line)
            shown.append(guard is None or (int(guard[1]), int(guard[2])) <= oldest)
        elif word[1] in ("else", "elif"):
            shown[-1] = not shown[-1]
        elif word[1] == "endif":
            shown.pop()
    return "\n".join(kept)


def is_mach_o(library: Path) -> bool:
    """Whether it is of macOS, by its first bytes."""
    return library.read_bytes()[:4] in (mach_o.MAGIC, mach_o.UNIVERSAL)


def undefined(library: Path) -> list[str]:
    """The symbols that a library expects from others; of ELF ``name`` or ``name@version``, as `nm` says.

    Raises:
        OSError: there is no `nm`.
        RuntimeError: `nm` cannot read the file.
        ValueError: it is of macOS, and not whole or for several architectures.
    """
    if is_mach_o(library):
        return mach_o.asked(library.read_bytes()).symbols
    command = ["nm", "-D", "-u", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    lines = [line.split() for line in done.stdout.splitlines()]
    # Weak ones may stay undefined: the linker's own hooks.
    return [words[-1] for words in lines if words and words[:-1] != ["w"]]


def unstable(symbols: list[str], stable: set[str], *, mach_o: bool = False) -> list[str]:
    """Those among undefined symbols that torch may not have tomorrow.

    Symbols with a version are of the C and C++ libraries. Mach-O has no versions (and a ``_`` in front);
    there only what torch and Python export is judged.
    """
    found = []
    for symbol in symbols:
        name = symbol.removeprefix("_") if mach_o else symbol
        if "@" in symbol or name in stable:
            continue
        ours = name.startswith(_OURS) or _OF_TORCH.match(symbol)
        if ours or not mach_o:
            found.append(symbol)
    return found
