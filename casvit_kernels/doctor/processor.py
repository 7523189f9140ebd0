"""The CPU: instruction sets that a hypervisor hides, the system withholds or the compiler left out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..backends.native import REMEDY
from .facts import Facts
from .finding import Finding

# Flags of /proc/cpuinfo that each instruction set of the kernels needs beside those before it.
_NEEDS = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16", "amx_int8"),
}
_ORDER = tuple(_NEEDS)
FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "bf16", "sve", "i8mm",
)  # fmt: skip


def findings(facts: Facts) -> Iterator[Finding]:
    if facts.native.why_not is not None:
        return  # that is said elsewhere, and what sets there are is not known
    usable = [name for name, reason in facts.native.sets.items() if reason is None]
    best = usable[0]
    cpuinfo = facts.cpuinfo or ""
    name = _field(cpuinfo, "model name")
    text = f"{best} kernels" + (f" on {name}" if name else "")
    yield (
        _translated(cpuinfo, text)
        or _withheld(facts, best, text)
        or _hidden(cpuinfo, best, text)
        or Finding("CPU", "ok", text)
    )


def features(cpuinfo: str) -> list[str]:
    """The extensions that matter here, by the names that Linux gives them."""
    flags = _flags(cpuinfo)
    return [name for name in FEATURES if name in flags]


def _translated(cpuinfo: str, text: str) -> Finding | None:
    if "VirtualApple" not in cpuinfo:
        return None
    remedy = "take an arm64 Python or image (docker run --platform linux/arm64)"
    return Finding("CPU", "note", f"{text}: x86-64 code, translated by Rosetta", remedy)


def _withheld(facts: Facts, best: str, text: str) -> Finding | None:
    """A better set, whose flags are all there."""
    for name, reason in facts.native.sets.items():
        if name == best:
            return None
        if reason is None or _missing(name, _flags(facts.cpuinfo or "")):
            continue
        remedy = "Linux 5.16 or later, outside of a sandbox that filters system calls"
        if "not in this build" in reason:
            remedy = f"a newer compiler (AMX: g++ 11); {REMEDY}"
        return Finding("CPU", "note", f"{text}; it has {name}, too: {reason}", remedy)
    return None


def _hidden(cpuinfo: str, best: str, text: str) -> Finding | None:
    """A better set, which CPUs of this kind have."""
    flags = _flags(cpuinfo)
    virtual = "hypervisor" in flags
    expected = _made_with(cpuinfo)
    if virtual and expected is None and _missing("avx2", flags):
        expected = (
            "avx2"  # a generic CPU that a hypervisor makes up; its hosts have had it for long
        )
    if expected is None or not (missing := _missing(expected, flags)):
        return None
    by = "the hypervisor" if virtual else "firmware, or the system,"
    found = f"{text}; {by} hides {' '.join(missing)}"
    remedy = "turn them on in the firmware, and boot without options that clear CPU features"
    if virtual:
        remedy = (
            "give the virtual machine the host's CPU: '-cpu host' (QEMU), mode='host-passthrough' "
            "(libvirt), cputype 'host' (Proxmox)"
        )
    return Finding("CPU", "problem" if best == "portable" else "note", found, remedy)


def _made_with(cpuinfo: str) -> str | None:
    """The best instruction set of this family and model; None where it is not known."""
    vendor = _field(cpuinfo, "vendor_id")
    try:
        family, model = int(_field(cpuinfo, "cpu family")), int(_field(cpuinfo, "model"))
    except ValueError:
        return None
    if vendor == "GenuineIntel" and family == 6:
        if model in (143, 173, 174, 207):  # Sapphire, Emerald, Granite Rapids
            return "amx"
        if model in (85, 106, 108):  # Skylake, Cascade Lake, Ice Lake servers
            return "avx512"
        if model in (60, 61, 63, 69, 70, 71, 78, 79, 86, 94):  # Haswell to Skylake
            return "avx2"
    if vendor == "AuthenticAMD":
        zen4 = family == 25 and (16 <= model < 32 or 96 <= model < 176)
        if zen4 or family == 26:
            return "avx512_bf16"
        if family in (23, 25):  # Zen to Zen 3
            return "avx2"
    return None


def _missing(name: str, flags: set[str]) -> list[str]:
    """Flags that an instruction set needs and that are not there."""
    if name not in _ORDER:
        return []
    needed = [flag for n in _ORDER[: _ORDER.index(name) + 1] for flag in _NEEDS[n]]
    return [flag for flag in needed if flag not in flags]


def _flags(cpuinfo: str) -> set[str]:
    return set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())


def _field(cpuinfo: str, name: str) -> str:
    """Of the first CPU."""
    found = re.search(rf"^{name}[ \t]*:[ \t]*(.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""
