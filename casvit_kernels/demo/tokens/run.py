"""The demo of token clustering, step by step: expedite, draw, time, write the page."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import __version__, _files, benchmark, photographs
from ..._optional import need
from ...backends import Problem, select
from ...tokens import Clusters, Report, cluster_tokens, expedite
from ...tokens.models import find_blocks, usual_size
from ..progress import phase
from . import network, page
from .pictures import borders, colours
from .results import Expedited, Latency, Model, Photograph, Results, Speed

ROUNDS = 7
# As published for ViT-L/16 on ADE20K: after 10 of 24 blocks, a map of 40 x 40 to 28 x 28.
_AT, _SIDE = 10 / 24, 28 / 40


@dataclass(frozen=True)
class Options:
    """What is asked for; see ``python -m casvit_kernels tokens --help``."""

    model: str = "vit_small_patch16_224"
    checkpoint: Path | None = None
    images: Path | None = None
    output: Path = Path("casvit_tokens.html")
    at: int | None = None  # None: 10 of 24 blocks
    until: int | None = None  # None: all
    grid: tuple[int, int] | None = None  # None: 28 of 40 tokens each way
    size: int | None = None  # pixels; None: the model's
    threads: int | None = None
    seed: int = 0


class TokensDemo:
    """Everything that can be wrong with the options is found here, before any work starts.

    Raises:
        ValueError: an option is wrong (the message names it), or `expedite` refuses the model.
        BackendUnavailable: CASVIT_KERNELS_BACKEND asks for a backend that cannot run here.
        MissingExtra: a package is not installed.
    """

    def __init__(self, options: Options) -> None:
        need("timm", "timm")
        need("PIL")
        _files.check_writable(options.output, "--output")
        if options.threads is not None:
            if options.threads < 1:
                raise ValueError(f"--threads: expected at least 1, got {options.threads}")
            torch.set_num_threads(options.threads)
        self.options = options
        # The default choice may be set to one that cannot run here, or that cannot cluster.
        self.backend = select(None, Problem("cpu", torch.float32)).name
        cluster_tokens(torch.zeros(1, 1, 1), (1, 1), (1, 1))
        self.network = network.build(options.model, options.size, options.checkpoint, options.seed)
        self.plain = self.network.model
        # Modules of its own, on which the hooks are, and the same weights.
        self.model = copy.deepcopy(self.plain, {id(p): p for p in self.plain.parameters()})
        self.report = self._expedite()
        self.photographs = photographs.load(options.images, side=self.network.size)

    def _expedite(self) -> Report:
        options, name = self.options, self.options.model
        # Where there is a convolutional stem it has blocks of its own beside timm's model.blocks.
        usual = getattr(self.model, "blocks", None)
        listed = isinstance(usual, (nn.Sequential, nn.ModuleList))
        try:
            path, blocks = find_blocks(self.model, "blocks" if listed else None)
        except ValueError as error:
            raise ValueError(f"--model: expedite does not serve {name}: {error}") from None
        size = usual_size(self.model)
        if size is None:
            raise ValueError(f"--model: {name} does not tell the size of its map of tokens")
        at, until = options.at, len(blocks) if options.until is None else options.until
        if at is None:
            at = min(max(1, round(_AT * len(blocks))), max(1, until - 1))
        if not 1 <= at < until <= len(blocks):
            raise ValueError(
                f"--at, --until: expected 1 <= at < until <= {len(blocks)}, the number of blocks of "
                f"{name}, got {at} and {until}"
            )
        grid = options.grid or (max(1, round(_SIDE * size[0])), max(1, round(_SIDE * size[1])))
        if grid[0] > size[0] or grid[1] > size[1]:
            raise ValueError(
                f"--grid: expected at most the map's {size[0]}x{size[1]} tokens at "
                f"{self.network.size} pixels, got {grid[0]}x{grid[1]}"
            )
        try:
            return expedite(self.model, at, grid, until, blocks=path, size=size)
        except (ValueError, TypeError) as error:
            raise ValueError(f"--model: expedite does not serve {name}: {error}") from None

    def run(self) -> Results:
        """All steps; the page is written at the end.

        Raises:
            NotWritten: the page could not be written, though it could be at the start.
        """
        pictures, report = self.photographs, self.report
        x = pictures.batch(None, self.network.mean, self.network.std)
        found, rows = [], []
        with phase("maps", len(x)) as bar:
            for name, pixels, image in zip(pictures.names, pictures.pixels, x, strict=True):
                bar.say(name)
                before, _ = features(self.plain, report, image[None])
                after, clusters = features(self.model, report, image[None])
                labels = clusters.labels()[0].view(clusters.size)
                similarity = F.cosine_similarity(before, after, dim=-1).mean().item()
                found.append(Photograph(name, len(labels.unique()), similarity))
                rows.append(page.Row(name, borders(pixels, labels), *colours(before, after)))
                bar.advance()
        results = Results(
            version=__version__,
            environment=benchmark.environment(),
            model=self._facts(),
            size=self.network.size,
            expedited=_expedited(report),
            photographs=found,
            photographs_found=pictures.found,
            speed=measure(self.plain, self.model, x[:1]),
            report=str(self.options.output),
        )
        _files.write_text(self.options.output, page.render(results, rows), "--output")
        return results

    def _facts(self) -> Model:
        checkpoint = self.options.checkpoint
        return Model(
            name=self.options.model,
            parameters=sum(p.numel() for p in self.plain.parameters()),
            checkpoint=None if checkpoint is None else str(checkpoint),
            backend=self.backend,
        )


@torch.no_grad()
def features(model: nn.Module, report: Report, x: Tensor) -> tuple[Tensor, Clusters]:
    """The map that a dense head sees, and the clusters of the map after block [at - 1].

    Args:
        model: of timm, expedited or not. report: of the expedited one.
        x: ``(1, 3, S, S)``.

    Returns:
        ``(H, W, C)``, without class and register tokens, and the clusters, which `expedite` makes of the
        same tokens with the same settings.
    """
    assert report.size is not None
    seen: list[Tensor] = []
    block = model.get_submodule(f"{report.blocks}.{report.at - 1}")
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        vit: Any = model
        whole: Tensor = vit.forward_features(x)
    finally:
        handle.remove()
    clusters = cluster_tokens(
        seen[0][:, report.prefix :],
        report.size,
        report.grid,
        iterations=report.iterations,
        window=report.window,
    )
    return whole[0, report.prefix :].unflatten(0, report.size), clusters


def measure(plain: nn.Module, expedited: nn.Module, x: Tensor) -> Speed:
    """Time both models on ``x`` ``(1, 3, S, S)``, in turn."""
    with phase("speed", 2 * (ROUNDS + 1)) as bar:
        timings = benchmark.interleave(
            {"plain": lambda: plain(x), "expedited": lambda: expedited(x)},
            rounds=ROUNDS,
            progress=bar.reach,
        )
    slow, fast = (Latency(t.median, t.p25, t.p75) for t in (timings["plain"], timings["expedited"]))
    return Speed(torch.get_num_threads(), ROUNDS, slow, fast, slow.seconds / fast.seconds)


def _expedited(report: Report) -> Expedited:
    before, after, tokens = report.macs_before, report.macs_after, report.tokens_before
    assert report.size is not None  # expedite was given the map's
    assert before is not None
    assert after is not None
    assert tokens is not None
    return Expedited(
        blocks=report.blocks,
        depth=report.depth,
        at=report.at,
        until=report.until,
        grid=report.grid,
        prefix=report.prefix,
        map=report.size,
        tokens_before=tokens,
        tokens_after=report.tokens_after,
        macs_before=before,
        macs_after=after,
        text=str(report),
    )
