"""Numbers and findings in words, the same in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..testing import FACTOR
from .check import Deviation, Parity
from .results import Results
from .speed import Latency, Speed, best
from .training import Training

MOST_RATIO = f"{FACTOR:g}"


def shape(sizes: Sequence[int]) -> str:
    return "x".join(str(size) for size in sizes)


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def error(value: float) -> str:
    return f"{value:.2e}"


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


ERRORS_HEAD = ("PyTorch's error", "fused error", "ratio", "")


def errors(d: Deviation) -> list[str]:
    """The columns of `ERRORS_HEAD`."""
    return [
        error(d.reference_error),
        error(d.fused_error),
        f"{d.ratio:.2f}",
        "passed" if d.passed else "FAILED",
    ]


def summary(results: Results) -> str:
    """What came out, in one sentence."""
    parity, speed = results.parity, results.speed
    name = results.model.name
    same = (
        f"Fused, {name} computes what PyTorch computes: no mixer's error is more than "
        f"{parity.worst.ratio:.2f} times PyTorch's own, and {parity.same_top1} of {parity.images} "
        "photographs get the same top-1 class"
    )
    if speed is None:
        return f"{same}."
    fused, other, eager = best(speed.model, True), best(speed.model, False), _eager(speed)
    text = (
        f"{same}; {speed.batch} photographs take {milliseconds(fused.seconds)}, "
        f"{times(eager.seconds / fused.seconds)} as fast as eager PyTorch"
    )
    if other.name != eager.name:
        text += f" and {times(other.seconds / fused.seconds)} as fast as {other.name}"
    return f"{text}, the best of the others."


def notes(results: Results) -> Iterator[str]:
    """What a reader must know to read the numbers rightly."""
    if results.model.checkpoint is None:
        yield (
            "The weights are untrained: no checkpoint was given (--checkpoint). Their "
            "normalisation statistics were taken from the photographs. Speed and parity do not "
            "depend on training; classes and gates mean nothing yet."
        )
    if results.model.backend == "reference":
        yield (
            "The fused kernels are not in use here: the reference backend computed the fused model "
            "too, so its times differ from eager's by chance alone. 'casvit-kernels info' says why."
        )
    if results.quick:
        yield "A quick run (--quick): few rounds and few steps; the figures are rough."
    if results.photographs_found > len(results.photographs):
        used = len(results.photographs)
        yield f"The first {used} of {results.photographs_found} photographs were used."


def figures(results: Results) -> Iterator[tuple[str, str, str]]:
    """The headline numbers: name, value, detail."""
    parity, speed, training = results.parity, results.speed, results.training
    if speed is not None:
        for name, rows in (("whole model", speed.model), ("token mixers alone", speed.mixers)):
            fused, other = best(rows, True), best(rows, False)
            yield (
                f"{name}: {fused.name} against {other.name}",
                times(other.seconds / fused.seconds),
                f"{milliseconds(fused.seconds)} against {milliseconds(other.seconds)}",
            )
    yield (
        "largest error of a mixer against PyTorch's own",
        times(parity.worst.ratio),
        f"{parity.worst.name}; at most {MOST_RATIO}x passes",
    )
    yield ("same top-1 class", f"{parity.same_top1} of {parity.images}", "photographs")
    if training is not None:
        fused_step, step = training.fused.step_seconds, training.reference.step_seconds
        yield (
            "training step of the small network: fused against reference",
            times(step / fused_step),
            f"{milliseconds(fused_step)} against {milliseconds(step)}",
        )
        yield (
            "digits right after training",
            percent(training.fused.accuracy),
            f"reference {percent(training.reference.accuracy)}",
        )


def parity_sentence(parity: Parity) -> str:
    if parity.passed:
        whole = ", and so do those of the network in one call" if parity.network else ""
        return f"All {len(parity.layers)} mixers and the logits pass{whole}."
    failed = [d.name for d in parity.outputs if not d.passed]
    return f"FAILED: {', '.join(failed)}."


def speed_sentence(speed: Speed) -> str:
    images = "1 image" if speed.batch == 1 else f"{speed.batch} images at once"
    threads = "1 thread" if speed.threads == 1 else f"{speed.threads} threads"
    return (
        f"{images}, float32, {threads}. Each of {speed.rounds} rounds calls "
        "all implementations in turn, in rotated order; given is the median of the rounds, and how "
        "many times as fast as eager PyTorch that is."
    )


def absent(speed: Speed) -> Iterator[str]:
    """What was not measured, by reason."""
    reasons: dict[str, list[str]] = {}
    for missing in speed.absent:
        reasons.setdefault(missing.reason, []).append(missing.name)
    for reason, names in reasons.items():
        yield f"Not measured: {', '.join(names)} ({reason})."


def training_sentence(training: Training) -> str:
    difference = training.largest_loss_difference
    curves = (
        "the two loss curves are equal to the last bit"
        if difference == 0
        else f"the two loss curves differ by at most {difference:.2e}"
    )
    return (
        f"A small CAS-ViT ({training.parameters:,} parameters) learns {training.images} "
        f"handwritten digits of scikit-learn in {training.steps} steps of {training.batch}, once "
        f"with the reference and once fused, from the same seed: {curves}. They begin equal up to "
        "rounding, and steps of training enlarge a rounding. A step is that of the whole network, "
        "optimizer included; the two take turns, and given is the median. Of the "
        f"{training.test_images} test digits, both networks give {training.same_predictions} the "
        "same class."
    )


TRAINING_HEAD = ("last loss", "test accuracy", "time per step")


def training_rows(training: Training) -> list[list[str]]:
    """For each network its name, then the columns of `TRAINING_HEAD`."""
    return [
        [
            name,
            f"{run.losses[-1]:.4f}",
            percent(run.accuracy),
            milliseconds(run.step_seconds),
        ]
        for name, run in (("reference", training.reference), ("fused", training.fused))
    ]


def gates_sentence(results: Results) -> str:
    meaning = (
        "With untrained weights they show what edges and textures random filters answer to."
        if results.model.checkpoint is None
        else "They show where the trained network looks."
    )
    return (
        "Each mixer multiplies q and k by one value between 0 and 1 per pixel, the sigmoid of a "
        "small convolution. Shown are those of the last mixer of each stage. "
        f"{meaning} Every column has a scale of its own, from the lowest to the highest value "
        "in its head."
    )


_LABELS = {
    "casvit_kernels": "casvit-kernels",
    "cpu": "CPU",
    "isa": "instruction set of the kernels",
    "torch_isa": "instruction set of PyTorch",
}


def facts(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """`benchmark.environment()` as name and value."""
    for name, value in environment.items():
        if value is not None:
            yield _LABELS.get(name, name), str(value)


def environment(results: Results) -> Iterator[tuple[str, str]]:
    yield from facts(results.environment)
    model = results.model
    yield "model", f"{model.name}, {model.parameters:,} parameters, {model.mixers} mixers"
    yield "weights", model.checkpoint or "untrained"
    yield "backend", model.backend
    yield "photographs", ", ".join(results.photographs)


def _eager(speed: Speed) -> Latency:
    return next(latency for latency in speed.model if latency.name == "eager")
