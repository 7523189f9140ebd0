"""Plain ViTs at 640 x 640, expedited against as they are: speed, the two layers' share, memory.

    python bench/accuracy/token_vits.py   # minutes, on a quiet machine; bench/results/token_vits.json
    python bench/report                   # writes docs/token_speed.md from it

timm's `vit_{small,base,large}_patch16` with random weights, 1600 tokens; clustered to 28 x 28 after 10
of 24 blocks (5 of 12), as published for ADE20K. Both models in turn in one process; memory in a process
of its own for each.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from casvit_kernels import _files, benchmark
from casvit_kernels.tokens import cluster_tokens, expedite, reconstruct_tokens

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "token_vits.json"
MODELS = {  # at which block
    "vit_small_patch16_224": 5,
    "vit_base_patch16_224": 5,
    "vit_large_patch16_224": 10,
}
SIZE, GRID, TOKENS = 640, (28, 28), (40, 40)


def made(name: str) -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model(name, img_size=SIZE, num_classes=0)
    return model.eval()


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Medians of alternating calls."""
    plain, fast = made(name), made(name)
    report = expedite(fast, at=MODELS[name], grid=GRID)
    x = torch.randn(1, 3, SIZE, SIZE)
    tokens = plain.forward_features(x)[:, 1:].contiguous()
    clusters = cluster_tokens(tokens, TOKENS, GRID)

    def layers() -> object:
        found = cluster_tokens(tokens, TOKENS, GRID)
        return reconstruct_tokens(found.centres, found)

    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: plain.forward_features(x),
        "expedited": lambda: fast.forward_features(x).sum(),  # whoever reads the map has it rebuilt
        "layers": layers,
        "clustering": lambda: cluster_tokens(tokens, TOKENS, GRID),
        "reconstruction": lambda: reconstruct_tokens(clusters.centres, clusters),
    }
    found: dict[str, list[float]] = {n: [] for n in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for n, call in calls.items():
            found[n].append(seconds(call))
    medians = {n: statistics.median(times) for n, times in found.items()}
    return {
        "model": name,
        "at": MODELS[name],
        "rounds": rounds,
        "speedup": round(medians["plain"] / medians["expedited"], 4),
        "share": round(medians["layers"] / medians["expedited"], 4),
        "clustering_of_layers": round(medians["clustering"] / medians["layers"], 4),
        "macs_ratio": round(report.macs_before / report.macs_after, 4),
        "memory_ratio": round(memory(name, False) / memory(name, True), 4),
    }


def memory(name: str, expedited: bool) -> int:
    """The most memory that a process with one model has had, in KiB."""
    command = [sys.executable, __file__, "--memory-of", name, *(["--expedited"] * expedited)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=tuple(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--expedited", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.memory_of:
        model = made(options.memory_of)
        if options.expedited:
            expedite(model, at=MODELS[options.memory_of], grid=GRID)
        model.forward_features(torch.randn(1, 3, SIZE, SIZE)).sum()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return 0
    rows = []
    for name in MODELS:
        rows.append(measured(name, options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    import timm

    document = {
        "environment": {
            **benchmark.environment(),
            "threads": options.threads,
            "timm": timm.__version__,
        },
        "size": SIZE,
        "tokens": TOKENS,
        "grid": GRID,
        "rows": rows,
    }
    _files.write_text(RESULT, json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
