"""The mixers of the paper's Figure 2 side by side: widths and maps of rcvit_xs, and larger maps.

Self-attention, separable self-attention and efficient additive attention are those of `bench.mixers`,
plain PyTorch as CATM is here ("catm"); ours are the "fused" ones. Each is another function: only CATM's
fused candidates are compared with float64 (the others in tests, token by token). One image, fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.harness import compare
from bench.harness.case import Case, Choice, Settings
from bench.harness.process_memory import Calls, of_process
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.statistics import randomise_statistics
from bench.harness.stepwise import Watcher, in_turn
from bench.mixers import (
    EfficientAdditiveAttention,
    SelfAttention,
    SeparableSelfAttention,
    macs,
    parameters,
)
from casvit_kernels.benchmark import Unavailable
from casvit_kernels.models import CONFIGS
from casvit_kernels.module import FusedCATM
from casvit_kernels.ops.mixer.reference import AdditiveTokenMixer

LEVEL, MODEL = "figure2", "xs"
MAPS = (56, 28, 14, 7)  # of the stages
GROWTH = (112, 224, 448)  # at the width of stage 1
MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "self-attention": SelfAttention,
    "self-attention sdpa": partial(SelfAttention, fused=True),
    "separable": SeparableSelfAttention,
    "efficient additive": EfficientAdditiveAttention,
    "catm": AdditiveTokenMixer,
    "fused": AdditiveTokenMixer,
}
LAYOUT = " channels_last"
NAMES = tuple(name + layout for name in MIXERS for layout in ("", LAYOUT))
GPU_NAMES = ()
MOST_BYTES = 8 * 2**30
MOST_MACS = 10**12  # of a call: a dozen seconds on two cores, and it is called a dozen times
PLAIN = "catm"


class Built(NamedTuple):
    """A candidate: the plain mixer that it computes, what is called, and its input."""

    plain: nn.Module
    run: nn.Module
    x: Tensor


def cases(choice: Choice) -> list[Case]:
    if choice.gpu or MODEL not in choice.models:
        return []
    widths = CONFIGS[f"rcvit_{MODEL}"].dims
    wanted = [(stage, size) for stage, size in enumerate(MAPS, 1)] + [(1, n) for n in GROWTH]
    if choice.quick:
        wanted = [(4, MAPS[3]), (1, 14)]
    return [Case(LEVEL, MODEL, s, widths[s - 1], n, 1, "float32") for s, n in wanted]


def build(name: str, channels: int, size: int, backend: str, batch: int = 1) -> Built:
    """One candidate with weights and input that depend on its mixer and shape alone."""
    torch.manual_seed(0)
    kind = name.removesuffix(LAYOUT)
    plain = randomise_statistics(MIXERS[kind](channels)).eval()
    x = torch.randn(batch, channels, size, size)
    run = FusedCATM.from_mixer(plain, backend=backend).eval() if kind == "fused" else plain
    layout = torch.channels_last if name.endswith(LAYOUT) else torch.contiguous_format
    return Built(plain, run.to(memory_format=layout), x.to(memory_format=layout))


def why_not(name: str, case: Case) -> str | None:
    """Why a candidate is not measured at a map, or None."""
    if not name.startswith("self-attention"):
        return None
    heads, tokens = SelfAttention(case.channels).heads, case.size**2
    scores = 2 * 4 * case.batch * heads * tokens**2  # before and after the softmax
    if "sdpa" not in name and scores > MOST_BYTES:
        return (
            f"at {case.size}x{case.size} its scores take {scores / 2**30:,.0f} GiB, more than "
            f"{MOST_BYTES >> 30} GiB"
        )
    count = 2 * case.batch * case.channels * tokens**2
    if count > MOST_MACS:
        return (
            f"at {case.size}x{case.size} it takes {count / 1e12:.1f} million million multiply-adds "
            f"a call, more than {MOST_MACS / 1e12:g}"
        )
    return None


def memory_calls(name: str, channels: int, size: int, backend: str) -> Calls:
    """For `process_memory`: one call of a candidate, after one of a small map."""
    made = build(name, channels, size, backend)
    small = build(name, channels, min(size, 7), backend)
    # The module that is measured is warm too: a fused one packs its weights once.
    return (
        lambda: _without_gradients(made.run, small.x),
        lambda: _without_gradients(made.run, made.x),
    )


def _without_gradients(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = module(x)
        return out


def run(
    case: Case, names: list[str], settings: Settings, watcher: Watcher | None = None
) -> Measured:
    """Parity of the fused ones, then all in turn, then each one's memory in a process of its own."""
    measured = Measured(case)
    reasons = {name: why_not(name, case) for name in names}
    measured.absent = {name: reason for name, reason in reasons.items() if reason is not None}
    present = [name for name in names if name not in measured.absent]
    built = {n: build(n, case.channels, case.size, settings.backend, case.batch) for n in present}
    plain = built[PLAIN]
    truth = compare.truth(case, plain.plain, plain.x)
    for name in present:
        if name.startswith((PLAIN, "fused")):
            got = _without_gradients(built[name].run, built[name].x)
            measured.errors[name], _ = compare.errors(case, got, truth)
    measured.refused = compare.refusal(case, measured, PLAIN, truth)
    if measured.refused is not None:
        return measured
    calls = {n: partial(_without_gradients, made.run, made.x) for n, made in built.items()}
    measured.timings = in_turn(case, calls, settings)
    for name, made in built.items():
        measured.row_facts[name] = {
            "macs": macs(made.plain, made.x.shape),
            "parameters": parameters(made.plain),
        }
    if settings.quick:  # a process for each takes a while
        return measured
    for name in present:
        arguments = {"name": name, "channels": case.channels, "size": case.size}
        try:
            peak = of_process(f"{__name__}:memory_calls", **arguments, backend=settings.backend)
        except Unavailable as error:
            measured.row_facts[name]["no_memory"] = str(error)
            continue
        measured.memory[name] = {"peak_bytes": peak}
    return measured


@replayed
def test_figure2(show: Callable[[], None]) -> None:
    show()
