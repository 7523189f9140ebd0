"""The main job, step by step: parity, speed, training, report."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, _files, benchmark, photographs
from .._optional import need
from ..backends import Problem, select
from ..surgery import fuse
from . import check, gates, network, report, results, speed, training
from .progress import phase


@dataclass(frozen=True)
class Options:
    """What the demo is asked to do; see ``python -m casvit_kernels demo --help``."""

    model: str = "rcvit_xs"
    checkpoint: Path | None = None
    images: Path | None = None
    output: Path = Path("casvit_report.html")
    threads: int | None = None
    quick: bool = False
    train: bool = True
    seed: int = 0


class Demo:
    """Everything that can be wrong with the options is found here, before any work starts.

    Raises:
        ValueError: an option is wrong (the message names it).
        BackendUnavailable: CASVIT_KERNELS_BACKEND asks for a backend that cannot run here.
        MissingExtra: a package of the extra ``demo`` is not installed.
    """

    def __init__(self, options: Options) -> None:
        for package in ("matplotlib", "numpy", "PIL", "skimage", "sklearn", "tqdm"):
            need(package)
        _files.check_writable(options.output, "--output")
        if options.threads is not None:
            if options.threads < 1:
                raise ValueError(f"--threads: expected at least 1, got {options.threads}")
            torch.set_num_threads(options.threads)
        self.options = options
        # The default choice may be set to one that cannot run here.
        self.backend = select(None, Problem("cpu", torch.float32)).name
        self.photographs = photographs.load(options.images)
        self.reference = network.build(options.model, options.checkpoint, options.seed)

    def run(self) -> results.Results:
        """All steps; the report is written unless parity failed.

        Raises:
            NotWritten: the report could not be written, though it could be at the start.
        """
        options, pictures = self.options, self.photographs
        x = pictures.batch()
        if options.checkpoint is None:
            network.calibrate(self.reference, x)
        fused = copy.deepcopy(self.reference)
        swapped = fuse(fused)
        if swapped.refused:
            raise RuntimeError(f"fuse() refused a mixer of {options.model}: {swapped}")
        inputs = network.mixer_inputs(self.reference, x)

        with phase("parity", len(inputs) + 1) as bar:
            parity = check.check(self.reference, fused, x, inputs, bar.advance)
        found = results.Results(
            version=__version__,
            environment=benchmark.environment(),
            quick=options.quick,
            photographs=list(pictures.names),
            photographs_found=pictures.found,
            model=self._facts(len(inputs)),
            parity=parity,
        )
        if not parity.passed:
            return found

        maps = gates.of_stages(self.reference, inputs)
        batch = pictures.batch(speed.BATCH)
        batch_inputs = network.mixer_inputs(self.reference, batch)
        measured = speed.measure(self.reference, batch, batch_inputs, options.quick)
        trained = None
        if options.train:
            with phase("training", training.steps(options.quick)) as bar:
                trained = training.train_both(options.seed, options.quick, bar.advance)
        found = replace(
            found,
            speed=measured,
            training=trained,
            gates=[results.GateRange(g.mixer, _range(g.q), _range(g.k)) for g in maps],
            report=str(options.output),
        )
        page = report.render(found, pictures.pixels, maps)
        _files.write_text(options.output, page, "--output")
        return found

    def _facts(self, mixers: int) -> results.ModelFacts:
        options = self.options
        return results.ModelFacts(
            name=options.model,
            parameters=sum(p.numel() for p in self.reference.parameters()),
            checkpoint=None if options.checkpoint is None else str(options.checkpoint),
            mixers=mixers,
            backend=self.backend,
        )


def _range(maps: Tensor) -> tuple[float, float]:
    return maps.min().item(), maps.max().item()
