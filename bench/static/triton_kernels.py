"""Compiles the Triton kernels ahead of time and reads the machine code; needs no GPU.

    python bench/static/triton_kernels.py            compile all, write the JSON file and the table
    python bench/static/triton_kernels.py --check    exit 1 where the files are not of these sources

A run adds the rows of the Triton that it imports; the table has those of each in VERSIONS. For another
than the one installed: `pip install --no-deps --target DIR triton==3.6.0`, and DIR in PYTHONPATH.
Each launch is recorded from the real phases, so what is compiled is what a GPU would be given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "triton_kernels.json"
TABLE = ROOT / "docs" / "triton_kernels.md"
SOURCES = ("tile", "forward", "backward")
VERSIONS = ("3.6.0", "3.9.0")  # of Triton: the oldest and the newest supported
# The least full block of each size of tile: `gates` and `backward_gate` have all channels in one. The
# others' tiles do not depend on C, their loads do on whether it is a multiple of 8.
CHANNELS = (48, 112, 220, 384, 512)
FEW_CHANNELS = (48, 220)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# What a thread block of each may have.
MOST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


class Config(NamedTuple):
    kernel: str
    channels: int
    layout: str
    dtype: str
    target: str


class Counts(NamedTuple):
    """What the compiler made of one kernel."""

    registers: int
    spilled: int  # bytes of stack a thread, or registers moved there
    shared: int  # bytes
    loads: str  # from global memory, in the text: "bytes x number", the widest first
    stores: str
    barriers: int
    shuffles: int
    instructions: int  # in the text, not executed


def source_hash() -> str:
    """Of all that decides what is compiled: the kernels' sources, tiles and options."""
    from casvit_kernels.ops.mixer.triton import plan, tuning

    folder = ROOT / "casvit_kernels" / "ops" / "mixer" / "triton"
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / f"{name}.py").read_bytes())
    for version in VERSIONS:
        for config in configs():
            if config.kernel in SMALL:
                threads = tuning.SMALL_THREADS[config.kernel]
                blocks = (tuning.BLOCK_IMAGES, tuning.BLOCK_CHANNELS, tuning.BLOCK_TERMS)
                made: Any = (*blocks, tuning.BLOCK)
            else:
                made = _tile(version, config)
                threads = made.threads
            options = [plan.options(config.kernel, threads, warp) for warp in (32, 64)]
            digest.update(repr((config, made, options)).encode())
    return digest.hexdigest()


def _tile(version: str, config: Config) -> Any:
    from casvit_kernels.ops.mixer.triton.tuning import tile

    major, minor = map(int, version.split(".")[:2])
    given = (config.layout == "NCHW", DTYPES[config.dtype].itemsize, (major, minor))
    return tile(config.kernel, config.channels, *given)


def configs() -> Iterator[Config]:
    """Every kernel in every configuration of the tuning table."""
    from casvit_kernels.ops.mixer.triton.launch import KERNELS

    for dtype in DTYPES:
        for layout in LAYOUTS:
            for kernel in KERNELS:
                if kernel in SMALL and (layout, dtype) != ("channels_last", "fp32"):
                    continue  # they see no map
                for c in CHANNELS if kernel in ("gates", "backward_gate") else FEW_CHANNELS:
                    for target in TARGETS:
                        yield Config(kernel, c, layout, dtype, target)


SMALL = ("merge_statistics", "channel_gates")


def launches(channels: int, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """The launches of a training step of a mixer, by kernel."""
    from casvit_kernels.ops.mixer.triton import precompile

    return {it.name: it for it in precompile.launches(channels, dtype, LAYOUTS[layout])}


def compile_launch(it: Any, target: str) -> Counts:
    """Compile one launch for a GPU that need not be there."""
    from casvit_kernels.ops.mixer.triton import precompile

    done = precompile.compile_for(it, target)
    shared = int(done.metadata.shared)
    return (
        _amd(done.asm["amdgcn"], shared)
        if "amdgcn" in done.asm
        else _nvidia(done.asm["cubin"], shared)
    )


_WIDTHS = {"": 4, "64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


def _histogram(widths: Iterable[int]) -> str:
    return " ".join(f"{w}x{n}" for w, n in sorted(Counter(widths).items(), reverse=True))


def _nvidia(cubin: bytes, shared: int) -> Counts:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: no registers in {usage!r}")
    registers, stack, local = map(int, found.groups())
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.M)
    moved = sum(4 for op in lines if op.startswith(("STL", "LDL")))

    def widths(*names: str) -> str:
        ops = (op.split(".") for op in lines if op.split(".")[0] in names)
        return _histogram(
            max((_WIDTHS[part] for part in op[1:] if part in _WIDTHS), default=4) for op in ops
        )

    return Counts(
        registers,
        max(stack + local, moved),
        shared,
        widths("LDG", "LDGSTS"),
        widths("STG"),
        sum(op.startswith("BAR") for op in lines),
        sum(op.startswith("SHFL") for op in lines),
        len(lines),
    )


def _amd(text: str, shared: int) -> Counts:
    fields = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", text, re.M))
    ops = re.findall(r"^\s+([a-z]\w+)(?:\s|$)", text, re.M)
    names = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}

    def widths(kind: str) -> str:
        found = (re.match(rf"(?:global|buffer)_{kind}_(\w+)", op) for op in ops)
        return _histogram(
            next((n for key, n in names.items() if key in m[1]), 1) for m in found if m
        )

    return Counts(
        int(fields["vgpr_count"]),
        int(fields["private_segment_fixed_size"]) + int(fields["vgpr_spill_count"]),
        shared,
        widths("load"),
        widths("store"),
        sum(op == "s_barrier" for op in ops),
        sum(op.startswith("ds_bpermute") or op.endswith("_dpp") for op in ops),
        len(ops),
    )


def count(config: Config, cache: dict[Any, Any]) -> Counts:
    """cache: keeps the recorded launches between calls."""
    key = config.channels, config.layout, config.dtype
    if key not in cache:
        cache[key] = launches(config.channels, config.layout, DTYPES[config.dtype])
    return compile_launch(cache[key][config.kernel], config.target)


WHY_NARROW = """\
Loads of 16 bytes need 8 neighbouring channels of 16 bits in one thread. In channels_last `statistics`,
`gates` and `combine` have them for their maps wherever C is a multiple of 8; at C = 220 the start of a
pixel is a multiple of 8 bytes alone. `combine` on gfx942 loads 8: with two waves, not one, a thread has
4 channels. `backward_gate` is like `gates`. `backward_combine` and `backward_depthwise` keep 20 sums of
weight gradients for each channel of a thread, so a thread has one or two channels, and loads as much.
In NCHW nothing is known of the alignment of a row when the kernel is compiled (7 x 7 images have odd
rows), so a thread loads single pixels; the threads of a warp load neighbours. Wider loads there are of
vectors. fp16 differs from bf16 in conversions alone.

Triton 3.6 takes more registers, and has fewer rows under way where it would spill with as many as 3.9.
What still spills there, 8 to 36 bytes, would need tiles of fewer pixels, which 3.9 does not."""


def table(document: dict[str, Any]) -> str:
    """docs/triton_kernels.md."""
    from casvit_kernels.ops.mixer.triton.tuning import SMALL_THREADS

    lines = [
        "# Triton kernels, as compiled",
        "",
        "Generated by `python bench/static/triton_kernels.py` from the machine code of every",
        f"configuration; do not edit. Triton {' and '.join(VERSIONS)}. Nothing here was timed.",
        "",
        "Registers of a thread (VGPRs on gfx942), `+n` bytes spilled; bytes of shared memory; loads",
        "from and stores to global memory by width, `16x9`: nine of 16 bytes; barriers, shuffles and",
        "instructions: all as they stand in the text, not as often as they run.",
        "",
        *WHY_NARROW.splitlines(),
    ]
    rows = [(r[0], Config(*r[1:6]), Counts(*r[6:])) for r in document["rows"]]
    for target in TARGETS:
        lines += [
            "",
            f"## {target}",
            "",
            "| kernel | dtype | layout | C | tile | threads | Triton | registers | shared | loads | "
            "stores | barriers | shuffles | instructions |",
            "|---|---|---|---:|---|---:|---|---:|---:|---|---|---:|---:|---:|",
        ]
        for version, config, n in sorted(
            rows,
            key=lambda row: (row[1].kernel, row[1].dtype, row[1].layout, row[1].channels, row[0]),
        ):
            if config.target != target:
                continue
            t = None if config.kernel in SMALL else _tile(version, config)
            size = "" if t is None else f"{t.pixels} x {t.channels}"
            threads = SMALL_THREADS[config.kernel] if t is None else t.threads
            spilled = f" +{n.spilled}" if n.spilled else ""
            lines.append(
                f"| {config.kernel} | {config.dtype} | {config.layout} | {config.channels} | "
                f"{size} | {threads} | {version} | "
                f"{n.registers}{spilled} | {n.shared} | {n.loads} | {n.stores} | "
                f"{n.barriers} | {n.shuffles} | {n.instructions} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when out of date"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing can be compiled in that process")
    old = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"source": "", "rows": []}
    kept = {tuple(r[:6]): r for r in old["rows"]} if old["source"] == source_hash() else {}
    if options.check:
        stale = {(v, *c) for v in VERSIONS for c in configs()} != kept.keys()
        stale = stale or not TABLE.is_file() or TABLE.read_text() != table(old)
        print("out of date" if stale else "up to date", file=sys.stderr)
        return int(stale)
    version = triton.__version__
    if version not in VERSIONS:
        parser.error(f"the table is of Triton {' and '.join(VERSIONS)}, this is {version}")
    todo = [c for c in configs() if (version, *c) not in kept]
    document = {"source": source_hash(), "rows": list(kept.values())}
    cache: dict[Any, Any] = {}
    for number, config in enumerate(todo):
        n = count(config, cache)
        document["rows"].append([version, *config, *n])
        print(f"{number + 1}/{len(todo)}", *config, n, flush=True)
        if number % 20 == 0:
            RESULTS.write_text(_json(document))
    RESULTS.write_text(_json(document))
    TABLE.write_text(table(document))
    return 0


def _json(document: dict[str, Any]) -> str:
    """A row a line."""
    rows = ",\n".join(json.dumps(r) for r in document["rows"])
    head = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1)
    return head[:-2] + ',\n "rows": [\n' + rows + "\n]}\n"


if __name__ == "__main__":
    sys.exit(main())
