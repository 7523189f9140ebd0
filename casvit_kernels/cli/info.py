"""`casvit-kernels info`: versions, CPU features and backends."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import benchmark
from ..backends import backends, cpu, cuda, gpu_order
from ..demo import phrases
from .arguments import Outcome, add_verb


def add(verbs: Any) -> None:
    """The parser of this verb."""
    add_verb(
        verbs,
        "info",
        run,
        "versions, CPU features, and each backend: usable or why not",
        "Shows what a report of a problem should contain.",
        "casvit-kernels info --json",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    document: dict[str, Any] = {
        "command": "info",
        "environment": benchmark.environment(),
        "cpu_features": _cpu_features(),
        "instruction_sets": cpu.instruction_sets(),
        "whole_network": {
            "instruction_set": cpu.active_instruction_set(),
            "precisions": benchmark.precisions(),
        },
        "cuda_build": cuda.build(),
        "gpu_order": [
            {"gpu": name, "capability": f"{major}.{minor}", **of._asdict()}
            for name, (major, minor), of in gpu_order.orders()
        ],
        "backends": [status._asdict() for status in backends()],
    }
    return Outcome(document, _text(document))


def _text(document: dict[str, Any]) -> str:
    facts = [[n, v] for n, v in phrases.facts(document["environment"])]
    facts.append(["CPU features", " ".join(document["cpu_features"]) or "unknown"])
    facts.append(["CUDA kernels", document["cuda_build"] or "not built"])
    facts.append(["whole networks (fuse_network)", _network(document["whole_network"])])
    sets = document["instruction_sets"]
    backends = [
        [b["name"], "usable" if b["usable"] else f"not usable: {b['reason']}"]
        for b in document["backends"]
    ]
    parts = [_pairs(facts)]
    orders = document["gpu_order"]
    here = "" if orders[0]["gpu"] else "; there is no GPU here"
    parts.append(f"cuda or triton first, in bfloat16 and float16{here}\n" + _pairs(_orders(orders)))
    if sets:
        parts.append("Instruction sets of the native library\n" + _pairs(_usable(sets)))
    parts.append("Backends, in order of preference\n" + _pairs(backends))
    return "\n\n".join(parts)


def _network(served: dict[str, Any]) -> str:
    if not served["precisions"]:
        return "no kernels: the model computes by itself"
    return f"{served['instruction_set']}, in {' and '.join(served['precisions'])}"


def _orders(orders: list[dict[str, Any]]) -> Iterator[list[str]]:
    for of in orders:
        gpu = f"{of['gpu'] or 'compute capability'} {of['capability']}"
        yield [gpu, f"{of['first']}, {of['why']}"]


def _usable(sets: dict[str, str | None]) -> Iterator[list[str]]:
    for name, reason in sets.items():
        yield [name, "usable" if reason is None else f"not usable: {reason}"]


def _pairs(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"  {row[0]:<{width}}  {row[1]}" for row in rows)


def _cpu_features() -> list[str]:
    """The instruction set extensions that matter here, by the names Linux gives them."""
    wanted = (
        "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16",
        "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "bf16", "sve", "i8mm",
    )  # fmt: skip
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((x for x in lines if x.lower().startswith(("flags", "features"))), "").split()
    return [name for name in wanted if name in flags]
