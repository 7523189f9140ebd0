"""A whole network beside ONNX Runtime, OpenVINO and torch.compile, each in a process of its own."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .. import benchmark, photographs
from .._optional import MissingExtra
from ..benchmark import NetworkSpeed, Timing
from ..export import to_onnx
from . import network
from .speed import Absent

LEAST_IMAGES = 8  # that exactness is of


@dataclass(frozen=True)
class Row:
    """One candidate; seconds per call."""

    name: str
    seconds: float
    p25: float
    p75: float
    to_best_rival: float | None  # the best rival's median over this one
    max_error: float  # of all images, against float64
    same_top1: int  # images with float64's top class
    share_of_peak: float | None
    facts: dict[str, str]


@dataclass(frozen=True)
class WholeNetwork:
    """One precision."""

    precision: str
    batch: int
    images: int
    macs: int  # of one image
    peak_macs_per_second: float | None
    rows: list[Row]
    absent: list[Absent]
    refused: str | None


def problem(
    name: str, batch: int, seed: int = 0, size: int = photographs.SIZE
) -> tuple[nn.Module, Tensor]:
    """A network with the statistics of photographs, and these: at least 8, a multiple of `batch`.

    Raises:
        MissingExtra: scikit-learn or scikit-image, which bring them, are missing.
    """
    model = network.build(name, None, seed)
    count = batch * math.ceil(LEAST_IMAGES / batch)
    x = photographs.load(None, side=size).batch(count)
    network.calibrate(model, x)
    return model, x


def measure(
    model: nn.Module,
    x: Tensor,
    *,
    batch: int,
    precision: str,
    names: Iterable[str] | None = None,
    backend: str | None = None,
    rounds: int = 15,
    starts: int = 3,
    min_round_seconds: float = 0.05,
    pause_seconds: float = 0.05,
    progress: Callable[[str], object] | None = None,
) -> NetworkSpeed:
    """`benchmark.time_network`, with the file that ONNX Runtime and OpenVINO read.

    It is `to_onnx`'s, which both run at least as fast as `torch.onnx.export`'s. Where the packages that
    write it are missing, they are absent.
    """
    wanted = benchmark.names_for(precision) if names is None else list(names)
    with tempfile.TemporaryDirectory() as folder:
        path: Path | None = Path(folder, "network.onnx")
        if {"onnxruntime", "openvino"} & {name.split()[0] for name in wanted}:
            if progress is not None:
                progress("exporting")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    to_onnx(model, str(path), example_input=x[:batch], verify=False)
            except MissingExtra:
                path = None
        else:
            path = None
        return benchmark.time_network(
            model,
            x,
            batch=batch,
            precision=precision,
            names=wanted,
            onnx=path,
            backend=backend,
            rounds=rounds,
            starts=starts,
            min_round_seconds=min_round_seconds,
            pause_seconds=pause_seconds,
            progress=progress,
        )


def summary(found: NetworkSpeed) -> WholeNetwork:
    """The figures of a table, the fastest candidate first."""

    def row(name: str, timing: Timing) -> Row:
        return Row(
            name,
            timing.median,
            timing.p25,
            timing.p75,
            found.ratio(name),
            found.exactness[name].max_error,
            found.exactness[name].same_top1,
            found.share(name),
            found.race.facts[name],
        )

    timings = found.race.timings
    rows = [row(name, timing) for name, timing in timings.items()]
    missing = {**timings.absent, **found.race.failed}
    return WholeNetwork(
        found.precision,
        found.batch,
        found.images,
        found.macs,
        found.peak,
        sorted(rows, key=lambda row: row.seconds),
        [Absent(name, reason) for name, reason in missing.items()],
        found.race.refused,
    )
