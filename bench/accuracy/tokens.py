"""mIoU of a plain ViT whose last blocks see fewer tokens, without fine-tuning, and its speed.

    python bench/accuracy/tokens.py            mIoU; trains three small models first
    python bench/accuracy/tokens.py --speed    speed alone, into the same file

Into bench/results/token_clustering.json; then python bench/report. Models and scenes are those of
examples/token_clustering.py. The temperature is chosen on training scenes for the published method:
it belongs to the distances between a model's features.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench" / "accuracy"), str(ROOT / "examples"), str(ROOT)]

import token_rivals as rivals  # noqa: E402
from scenes import Scenes  # noqa: E402
from segmentation_vit import (  # noqa: E402
    IoU,
    Recipe,
    SegmentationViT,
    scenes_of,
    trained,
)

from casvit_kernels import _files, benchmark  # noqa: E402
from casvit_kernels.backends import Problem, select  # noqa: E402
from casvit_kernels.tokens import cluster_tokens, reconstruct_tokens  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "token_clustering.json"
SEEDS = (0, 1, 2)
SCENES, SCENES_TUNED, BATCH = 48, 16, 8
BLOCKS = (2, 4, 6)  # of 10: before them tokens are dense
GRIDS = ((14, 14), (17, 17), (20, 20), (24, 24))  # of 28 x 28: 0.25, 0.37, 0.51, 0.73
FEW = ((14, 14), (20, 20))  # of the other blocks
PUBLISHED = 4, (20, 20)  # 40 % of the blocks, half of the tokens
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.3)
RESIDUAL: dict[str, Any] = {"norm": "sum", "window": 5, "residual": True}
FULL, TOME = "full", "ToMe"


def clustering(
    temperature: float, iterations: int = 5, at_means: bool = False, **settings: Any
) -> rivals.Method:
    """The library's functions; centres are in the middle of cells, or where their tokens are."""

    def method(
        x: Tensor, places: Tensor, size: rivals.Size, grid: rivals.Size
    ) -> tuple[Tensor, Tensor, rivals.Rebuild]:
        found = cluster_tokens(x, size, grid, iterations=iterations, temperature=temperature)
        if at_means:
            where = found.mean(places.expand(x.shape[0], -1, -1))
        else:
            where = rivals.averaged(places, size, grid)
        return found.centres, where, partial(reconstruct_tokens, clusters=found, **settings)

    return method


def methods(temperature: float) -> dict[str, rivals.Method]:
    return {
        "clustering, as published": clustering(temperature),
        "clustering, sum": clustering(temperature, norm="sum"),
        "clustering, sum, window 5": clustering(temperature, norm="sum", window=5),
        "clustering, residual": clustering(temperature, **RESIDUAL),
        "clustering, at means": clustering(temperature, at_means=True),
        "clustering, residual, at means": clustering(temperature, at_means=True, **RESIDUAL),
        "clustering, residual, at means, 2 iterations": clustering(
            temperature, 2, at_means=True, **RESIDUAL
        ),
        "average pooling, nearest": rivals.pooling("nearest"),
        "average pooling, bilinear": rivals.pooling("bilinear"),
        "average pooling, bilinear, residual": rivals.pooling("bilinear", residual=True),
        "strided, nearest": rivals.striding,
    }


class Evaluated:
    """A model on scenes: what it makes of them before each block is computed once."""

    def __init__(self, model: SegmentationViT, scenes: Scenes, count: int) -> None:
        self.model, self.parts = model, []
        for first in range(0, count, BATCH):
            images, labels = scenes.batch(first, BATCH)
            x, self.places, self.size = model.embed(images)
            before = {0: x}
            for number, block in enumerate(model.blocks, 1):
                x = block(x, self.places)
                if number in (*BLOCKS, len(model.blocks)):
                    before[number] = x
            self.parts.append((before, labels))

    def miou(self, rest: Callable[[Tensor], Tensor], at: int) -> float:
        """In percent, of `rest` in place of the blocks from `at` on."""
        iou = IoU()
        for before, labels in self.parts:
            out = self.model.scores(rest(before[at]), self.size, tuple(labels.shape[1:]))
            iou.add(out, labels)
        return round(100 * iou.mean(), 3)

    def reduced(self, method: rivals.Method | None, at: int, grid: rivals.Size) -> float:
        return self.miou(rest(self.model, method, at, self.places, self.size, grid), at)


def rest(
    model: SegmentationViT,
    method: rivals.Method | None,
    at: int,
    places: Tensor,
    size: rivals.Size,
    grid: rivals.Size,
) -> Callable[[Tensor], Tensor]:
    """The blocks from `at` on with fewer tokens; dense again. Without a method: ToMe."""

    def run(x: Tensor) -> Tensor:
        if method is None:
            return rivals.tome(model.blocks[at:], x, places, grid[0] * grid[1])
        y, fewer, rebuild = method(x, places, size, grid)
        for block in model.blocks[at:]:
            y = block(y, fewer)
        return rebuild(y)

    return run


def chosen_temperature(on: Evaluated) -> tuple[float, dict[str, float]]:
    """The best of `TEMPERATURES` for the published method at the published ratio, and all of them."""
    at, grid = PUBLISHED
    found = {str(t): on.reduced(clustering(t), at, grid) for t in TEMPERATURES}
    return float(max(found, key=lambda t: found[t])), found


@torch.inference_mode()
def accuracy(folder: Path) -> dict[str, Any]:
    """Every method on every grid after every block; a list of mIoUs has one for each seed."""
    rows: dict[tuple[str, int, rivals.Size], list[float]] = {}
    full, tuned = [], []
    for seed in SEEDS:
        with torch.inference_mode(False):
            model = trained(Recipe(seed=seed), folder, print)
        temperature, found = chosen_temperature(
            Evaluated(model, scenes_of("train", seed=1000 + seed), SCENES_TUNED)
        )
        tuned.append({"temperature": temperature, "miou": found})
        on = Evaluated(model, scenes_of("test", seed=seed), SCENES)
        full.append(on.miou(lambda x: x, len(model.blocks)))
        print(f"seed {seed}: full {full[-1]}, temperature {temperature}", flush=True)
        for at in BLOCKS:
            for grid in GRIDS if at == PUBLISHED[0] else FEW:
                for name, method in {**methods(temperature), TOME: None}.items():
                    score = on.reduced(method, at, grid)
                    rows.setdefault((name, at, grid), []).append(score)
                    print(f"  {at} {grid} {name}: {score}", flush=True)
    return {
        "environment": benchmark.environment(),
        "recipe": asdict(Recipe()),
        "seeds": list(SEEDS),
        "scenes": SCENES,
        "size": list(on.size),
        "full": full,
        "tuned": tuned,
        "rows": [
            {"method": name, "at": at, "grid": list(grid), "miou": scores}
            for (name, at, grid), scores in rows.items()
        ],
    }


def speed(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`found` with how many times as fast as the full model each row is, medians in turn."""
    model = trained(Recipe(seed=found["seeds"][0]), folder, print)
    known = methods(found["tuned"][0]["temperature"])
    images, _ = scenes_of("test").batch(0, 1)
    pixels = (images.shape[2], images.shape[3])

    def call(name: str, at: int, grid: rivals.Size) -> Tensor:
        x, places, size = model.embed(images)
        for block in model.blocks[:at]:
            x = block(x, places)
        return model.scores(rest(model, known.get(name), at, places, size, grid)(x), size, pixels)

    for at in BLOCKS:
        rows = [row for row in found["rows"] if row["at"] == at]
        calls = {
            str(i): partial(call, r["method"], at, tuple(r["grid"])) for i, r in enumerate(rows)
        }
        timings = benchmark.interleave({FULL: partial(model, images), **calls})
        for i, row in enumerate(rows):
            row["speed"] = round(timings[FULL].median / timings[str(i)].median, 3)
            row["median_s"] = round(timings[str(i)].median, 6)
    return {
        **found,
        "speed_environment": benchmark.environment(),
        "speed_backend": select(None, Problem("cpu", torch.float32)).name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", action="store_true", help="time what the file has; no mIoU")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "token_clustering")
    options = parser.parse_args()
    if options.speed:
        found = speed(json.loads(RESULTS.read_text(encoding="utf-8")), options.models)
    else:
        found = accuracy(options.models)
    _files.write_text(RESULTS, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
