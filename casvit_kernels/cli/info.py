"""`casvit-kernels info`: versions, the machine, each backend, and every choice with its reason."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .. import benchmark
from ..backends import Problem, backends, cpu, cuda, explain, gpu_order
from ..demo import phrases
from ..doctor import facts, processor, variables
from ..doctor.finding import WIDTH
from ..ops.network import dispatch
from ..ops.network.kernels import PRECISIONS
from .arguments import Outcome, add_verb

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Whose reasons tell something on a device; the others' is that they compute elsewhere.
_OF_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_TOLD_BELOW = ("cores", "threads")  # with more beside them
_THREADS = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT")


def add(verbs: Any) -> None:
    """The parser of this verb."""
    add_verb(
        verbs,
        "info",
        run,
        "versions, the machine, each backend: usable or why not, and which one serves what",
        "Shows what a report of a problem should contain. 'casvit-kernels doctor' looks for mistakes.",
        "casvit-kernels info --json",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    found = {"command": "info", **document()}
    return Outcome(found, _text(found))


def document() -> dict[str, Any]:
    """All of it, as it goes into --json."""
    here = facts.gather()
    return {
        "environment": benchmark.environment(),
        "cpu_features": processor.features(here.cpuinfo or ""),
        "instruction_sets": cpu.instruction_sets(),
        "instruction_set": _instruction_set(here),
        "whole_network": _whole_network(),
        "threads": {
            "torch": here.threads,
            "set_by": [f"{n}={here.environ[n]}" for n in _THREADS if n in here.environ],
            "cpus": here.cpus,
            "allowed": here.allowed,
            "quota": here.quota,
        },
        "variables": [v._asdict() for v in variables.present(here.environ)],
        "cuda_build": cuda.build(),
        "gpu_order": [
            {"gpu": name, "capability": f"{major}.{minor}", **of._asdict()}
            for name, (major, minor), of in gpu_order.orders()
        ],
        "choices": list(_choices()),
        "backends": [status._asdict() for status in backends()],
    }


def _instruction_set(here: facts.Facts) -> dict[str, Any]:
    """The one in use, and why this one."""
    active, forced = cpu.active_instruction_set(), here.environ.get(variables.ISA)
    why = f"{variables.ISA} asks for it" if forced else "the best that this CPU and this build have"
    return {"active": active, "why": here.native.why_not if active is None else why}


def _whole_network() -> dict[str, Any]:
    """What `fuse_network` gets here."""
    choice = explain(Problem("cpu", torch.float32), dispatch.ABLE, "a whole network")
    reasons = [choice.error, *(s.reason for s in choice.passed_over)]
    if choice.asked is not None and choice.backend == "reference":
        reasons.append(f"{choice.asked} asks for the reference formulas")
    served = benchmark.precisions()
    return {
        "instruction_set": cpu.active_instruction_set(),
        "precisions": served,
        "without": {p: dispatch.why_not_precision(p) for p in PRECISIONS if p not in served},
        "why_not": None if choice.backend == "cpu" else next(filter(None, reasons), None),
        "threads": dispatch.thread_count(),
    }


def _choices() -> Iterator[dict[str, Any]]:
    """Which backend serves a mixer, for each device and dtype, and why none before it."""
    devices: list[tuple[str, int | None, str | None]] = [("cpu", None, None)]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        devices += [("cuda", i, torch.cuda.get_device_name(i)) for i in range(count)]
    if torch.backends.mps.is_available():
        devices.append(("mps", None, None))
    for device, ordinal, name in devices:
        for dtype in DTYPES:
            choice = explain(Problem(device, dtype, ordinal=ordinal))
            yield {
                "device": device if ordinal is None else f"{device}:{ordinal}",
                "gpu": name,
                "dtype": str(dtype).removeprefix("torch."),
                **choice._asdict(),
                "passed_over": [status._asdict() for status in choice.passed_over],
            }


def _text(document: dict[str, Any]) -> str:
    told = document["environment"].items()
    rows = [[n, v] for n, v in phrases.facts({n: v for n, v in told if n not in _TOLD_BELOW})]
    rows.append(["CPU features", " ".join(document["cpu_features"]) or "unknown"])
    rows.append(["CUDA kernels", document["cuda_build"] or "not built"])
    rows += _network(document["whole_network"])
    rows.append(["threads", _threads(document["threads"])])
    parts = [_pairs(rows)]
    orders = document["gpu_order"]
    here = "" if orders[0]["gpu"] else "; there is no GPU here"
    parts.append(f"cuda or triton first, in bfloat16 and float16{here}\n" + _pairs(_orders(orders)))
    sets, chosen = document["instruction_sets"], document["instruction_set"]
    if sets:
        parts.append("Instruction sets of the native library\n" + _pairs(_usable(sets, chosen)))
    parts.append("Backends, in order of preference\n" + _pairs(_backends(document["backends"])))
    parts.append(
        "Which one serves a mixer, where the call (backend=) and use_backend ask for none\n"
        + _pairs(_served(document["choices"], chosen["active"]))
    )
    found = [[f"{v['name']}={v['value']}", v["effect"]] for v in document["variables"]]
    title = "Environment variables that are set"
    parts.append(f"{title}\n{_pairs(found)}" if found else f"{title}: none that matters here")
    return "\n\n".join(parts)


def _network(served: dict[str, Any]) -> Iterator[list[str]]:
    title = "whole networks (fuse_network)"
    if not served["precisions"]:
        yield [title, "no kernels: the model computes by itself"]
        return
    if served["why_not"] is not None:
        yield [title, f"not served: {served['why_not']}"]
        return
    yield [title, f"{served['instruction_set']}, in {' and '.join(served['precisions'])}"]
    for precision, reason in served["without"].items():
        yield [f"whole networks in {precision}", f"no: {reason}"]


def _threads(of: dict[str, Any]) -> str:
    by = f" ({', '.join(of['set_by'])})" if of["set_by"] else ""
    quota = "no CPU quota" if of["quota"] is None else f"a CPU quota of {of['quota']:g}"
    return (
        f"{of['torch']}{by}, of PyTorch and the kernels together; {of['allowed']} of {of['cpus']} CPUs "
        f"for this process, {quota}"
    )


def _orders(orders: list[dict[str, Any]]) -> Iterator[list[str]]:
    for of in orders:
        gpu = f"{of['gpu'] or 'compute capability'} {of['capability']}"
        yield [gpu, f"{of['first']}, {of['why']}"]


def _usable(sets: Mapping[str, str | None], chosen: dict[str, Any]) -> Iterator[list[str]]:
    for name, reason in sets.items():
        use = f", in use: {chosen['why']}" if name == chosen["active"] else ""
        yield [name, f"usable{use}" if reason is None else f"not usable: {reason}"]


def _backends(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    for b in found:
        yield [b["name"], "usable" if b["usable"] else f"not usable: {b['reason']}"]


def _served(choices: list[dict[str, Any]], isa: str | None) -> Iterator[list[str]]:
    """One line for the dtypes of a device that are served alike."""
    groups: dict[tuple[str, str], list[str]] = {}
    for of in choices:
        device = of["device"] + (f" ({of['gpu']})" if of["gpu"] else "")
        groups.setdefault((device, _serves(of, isa)), []).append(of["dtype"])
    for (device, answer), dtypes in groups.items():
        yield [f"{device}, {', '.join(dtypes)}", answer]


def _serves(of: dict[str, Any], isa: str | None) -> str:
    if of["backend"] is None:
        return f"an error: {of['error']}"
    answer = f"{of['backend']} ({isa})" if of["backend"] == "cpu" else str(of["backend"])
    if of["asked"] is not None:
        answer += f", as {of['asked']} asks"
    able = _OF_DEVICE.get(of["device"].partition(":")[0], ())
    reasons = [f"{s['name']}: {s['reason']}" for s in of["passed_over"] if s["name"] in able]
    return "; not ".join([answer, *reasons])


def _pairs(rows: Iterable[Sequence[str]]) -> str:
    """Names and what is so, in lines of 80 columns where there are blanks to break at."""
    rows = list(rows)
    width = max(len(row[0]) for row in rows)
    wrapped = [
        textwrap.wrap(
            row[1],
            width=WIDTH,
            initial_indent=f"  {row[0]:<{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
        or [f"  {row[0]}"]
        for row in rows
    ]
    return "\n".join(line for lines in wrapped for line in lines)
