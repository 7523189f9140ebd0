"""Compiles the CUDA kernels and counts what their machine code does; needs nvcc and no GPU.

    python bench/static/cuda_kernels.py            compile where sources changed, write JSON and table
    python bench/static/cuda_kernels.py --again    compile in any case: the counting changed
    python bench/static/cuda_kernels.py --check    exit 1 where files are out of date; needs no nvcc

How instructions are counted. Loops are found in the machine code and told apart by what they have
(the rules of each kernel in cuda_forward.py and cuda_backward.py): asynchronous copies, mma with
ldmatrix (sweeps), mma with transposed ldmatrix (pooled sums, the taps' gradients), loads of q and k
made into a, exponentials (sigmoid), stores. A loop that no rule fits is an error. Of an unrolled loop
the body counts, not its remainders: its instructions over the pieces of work in one round, told by how
many copies, mma, stores, ... it has. Times the pieces that a block has, from how the map is cut
(`rounds` there); so a body of 35 instructions with 4 copies costs 8.75 a copy of 8 bytes. Loops around
it count as often as they go round, without the remainders' work in them. Loops over rows of maps take
several rows at once or one: either side counts as often as warps take it, and a warp takes both where
its threads do. So do the rounds in which groups of warps take turns. What is in no loop counts once
for each warp ("straight", in the table "rest"). Both sides of a branch count, there and around bodies,
so the sum errs upwards; subroutines (divisions in rare cases) do not count. Then times the blocks and 32
threads of a warp, over B C H W: thread-instructions for each output pixel and channel, q and k both
counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")]

from cuda_counts import KERNELS, count, instance  # noqa: E402
from cuda_table import table  # noqa: E402
from cuda_work import Launch, Plan, Shape  # noqa: E402
from sass import Function, functions  # noqa: E402

from bench.report.gpu_order import FORWARD  # noqa: E402
from casvit_kernels.ops.mixer.plans import DEVICES, Device  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "cuda_kernels.json"
TRITON = ROOT / "bench" / "results" / "triton_kernels.json"
TABLE = ROOT / "docs" / "cuda_kernels.md"
SOURCES = ROOT / "csrc" / "cuda"
STAGES = ((48, 56), (56, 28), (112, 14), (220, 7))  # C, H = W of xs at 224 x 224 input
BATCH = 256


class Target(NamedTuple):
    name: str  # of the GPU
    multiprocessors: int
    shared: int  # bytes that a block may ask for
    cluster: int  # blocks that may share theirs
    threads: int  # of a multiprocessor


def _target(architecture: str, device: Device) -> Target:
    name, multiprocessors, shared, _, cluster = device
    return Target(
        name, multiprocessors, shared, cluster, 1536 if architecture == "sm_120" else 2048
    )


# By the name that nvcc is given.
TARGETS = {
    {"sm_90": "sm_90a"}.get(name, name): _target(name, device) for name, device in DEVICES.items()
}


def source_hash() -> str:
    """Of all that decides the machine code and the rows: the kernels without comments, the compiler."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cu"), SOURCES / "toolkit.txt"]):
        text = re.sub(r"//.*|^# .*", "", path.read_text(), flags=re.M)
        digest.update(f"{path.name} {' '.join(text.split())}\n".encode())
    digest.update(repr((TARGETS, STAGES, BATCH, list(KERNELS))).encode())
    return digest.hexdigest()


def tool(name: str) -> str | None:
    """nvcc or cuobjdump: of CUDA_HOME, of `make cuda`, or what is there."""
    folders = [ROOT / "build" / "cuda-toolkit" / "nvidia" / "cu13" / "bin"]
    if "CUDA_HOME" in os.environ:
        folders.insert(0, Path(os.environ["CUDA_HOME"]) / "bin")
    found = [str(f / name) for f in folders if (f / name).is_file()]
    return found[0] if found else shutil.which(name)


def version() -> str:
    text = subprocess.run([_tool("nvcc"), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", text.stdout)
    return found[1] if found else "unknown"


def _tool(name: str) -> str:
    found = tool(name)
    if found is None:
        raise SystemExit(
            f"there is no {name}: `make cuda` installs one, or CUDA_HOME names its folder"
        )
    return found


def compiled(target: str) -> dict[str, Function]:
    found: dict[str, Function] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted({kernel.source for kernel in KERNELS.values()}):
            cubin = Path(folder) / f"{source}.cubin"
            subprocess.run(
                [
                    *(
                        _tool("nvcc"),
                        "-std=c++17",
                        "-O3",
                        '-DCASVIT_CUDA_NAMES=""',
                        f"-I{ROOT / 'csrc'}",
                    ),
                    *(f"-arch={target}", "-cubin", str(SOURCES / source), "-o", str(cubin)),
                ],
                check=True,
            )
            found |= functions(cubin, Path(_tool("cuobjdump")))
    return found


def plans(shape: Shape, target: str) -> tuple[dict[str, Plan], bool]:
    """How the library cuts a shape on this GPU, and whether it takes the mixer in one launch: asked of
    its own code, compiled for the host. A kernel without a plan does not fit."""
    from cuda_emulation import build

    t = TARGETS[target]
    call = build.module().MixerCall(
        list(shape), False, t.multiprocessors, t.shared, t.cluster, [0] * 4, 0, 0, False, "", []
    )
    found = zip(KERNELS, call.plans(), strict=True)
    fit = {name: Plan(*(p[field] for field in Plan._fields)) for name, p in found if p["rows"] > 0}
    return fit, call.prefers_single_pass()


def shapes(target: str) -> Iterator[tuple[str, Shape]]:
    """Type and shape of the rows: float16 once, to see that it is alike."""
    every = [Shape(BATCH, c, edge, edge) for c, edge in STAGES]
    yield from (("bf16", shape) for shape in every)
    if target == "sm_90a":
        yield "fp16", every[0]


def rows(target: str) -> list[dict[str, Any]]:
    """Of one architecture, a row for each type, stage and kernel."""
    of, found = compiled(target), []
    for dtype, shape in shapes(target):
        cuts, one_launch = plans(shape, target)
        parts = cuts["gates"].bands * cuts["gates"].columns
        for name, plan in cuts.items():
            kernel, launch = KERNELS[name], Launch(shape, plan, parts)
            function = of[instance(kernel, dtype, plan, list(of))]
            phases, counted = count(kernel, function, launch)
            asked = kernel.traffic(launch)
            maps = sum(sum(asked[buffer]) for buffer in kernel.maps)
            found.append(
                {
                    "target": target,
                    "dtype": dtype,
                    "channels": shape.channels,
                    "kernel": name,
                    "plan": list(plan),
                    "chosen": name not in FORWARD or one_launch == (name == "single_pass"),
                    "registers": function.registers,
                    "spilled": function.spilled,
                    "phases": [list(p) for p in phases.values()],
                    "loops": {phase: round(n, 3) for phase, n in counted.loops.items()},
                    "straight": round(counted.straight, 3),
                    "mma": round(counted.mma, 3),
                    "maps": round(maps / shape.unit, 4),
                    "rest": round(
                        sum(map(sum, asked.values())) / shape.unit - maps / shape.unit, 4
                    ),
                }
            )
    return found


def text(document: dict[str, Any]) -> str:
    """docs/cuda_kernels.md."""
    return table(document, json.loads(TRITON.read_text()), TARGETS, STAGES, BATCH)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--again", action="store_true", help="compile, whatever the hash")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when out of date"
    )
    options = parser.parse_args(arguments)
    document = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"source": ""}
    stale = document["source"] != source_hash()
    if options.check:
        stale = stale or not TABLE.is_file() or TABLE.read_text() != text(document)
        print("out of date" if stale else "up to date", file=sys.stderr)
        return int(stale)
    if stale or options.again:
        document = {"nvcc": version(), "source": source_hash(), "rows": []}
        for target in TARGETS:
            document["rows"] += rows(target)
            print(target, flush=True)
        RESULTS.write_text(_json(document))
    TABLE.write_text(text(document))
    return 0


def _json(document: dict[str, Any]) -> str:
    """A row a line."""
    lines = ",\n".join(json.dumps(r) for r in document["rows"])
    head = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1)
    return head[:-2] + ',\n "rows": [\n' + lines + "\n]}\n"


if __name__ == "__main__":
    sys.exit(main())
