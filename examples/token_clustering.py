"""Fewer tokens for the last blocks of a trained plain ViT, without fine-tuning: what it costs in mIoU.

python examples/token_clustering.py
python examples/token_clustering.py --at 4 --grid 20 20 --scenes 64

Trains a small ViT on scenes of digits (minutes, once: it is kept under --models), then answers test
scenes with all tokens; with clusters of them after block --at, rebuilt as published (arXiv 2210.01035)
and as a residual; and with as many average-pooled ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scenes import Scenes
from segmentation_vit import IoU, Recipe, SegmentationViT, scenes_of, trained
from torch import Tensor

from casvit_kernels.tokens import TokenClustering, TokenReconstruction

Size = tuple[int, int]
RECONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "residual": {"norm": "sum", "window": 5, "residual": True},
}


def clustered(
    model: SegmentationViT,
    images: Tensor,
    at: int,
    grid: Size,
    temperature: float,
    reconstruction: str = "residual",
) -> Tensor:
    """Class scores with the blocks from `at` on computed on a grid of cluster centres."""
    cluster = TokenClustering(grid, temperature=temperature)
    reconstruct = TokenReconstruction(**RECONSTRUCTIONS[reconstruction])
    x, places, size = model.embed(images)
    for block in model.blocks[:at]:
        x = block(x, places)
    clusters = cluster(x, size)
    where = clusters.mean(places.expand(len(images), -1, -1))
    y = rest(model, at, clusters.centres, where)
    return model.scores(reconstruct(y, clusters), size, (images.shape[2], images.shape[3]))


def pooled(model: SegmentationViT, images: Tensor, at: int, grid: Size) -> Tensor:
    """As `clustered`, with averages of cells and bilinear upsampling."""
    x, places, size = model.embed(images)
    for block in model.blocks[:at]:
        x = block(x, places)
    y = rest(model, at, averaged(x, size, grid), averaged(places, size, grid))
    maps = F.interpolate(y.transpose(1, 2).unflatten(2, grid), size, mode="bilinear")
    return model.scores(maps.flatten(2).transpose(1, 2), size, (images.shape[2], images.shape[3]))


def rest(model: SegmentationViT, at: int, y: Tensor, places: Tensor) -> Tensor:
    """The blocks from `at` on, of tokens at these places."""
    for block in model.blocks[at:]:
        y = block(y, places)
    return y


def averaged(x: Tensor, size: Size, grid: Size) -> Tensor:
    """Means of the grid's cells."""
    maps = x.transpose(1, 2).unflatten(2, size)
    return F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


@torch.inference_mode()
def miou(answer: Callable[[Tensor], Tensor], scenes: Scenes, count: int) -> float:
    """Of the first `count` scenes, in percent."""
    found = IoU()
    for index in range(count):
        images, labels = scenes.batch(index, 1)
        found.add(answer(images), labels)
    return 100 * found.mean()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--at", type=int, default=4, help="blocks on all tokens, of 10 (4)")
    parser.add_argument("--grid", type=int, nargs=2, default=(20, 20), help="of 28 28 (20 20)")
    parser.add_argument("--temperature", type=float, default=0.02, help="of distances (0.02)")
    parser.add_argument("--scenes", type=int, default=64, help="test scenes (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=5, default=Recipe.steps, help="of training")
    parser.add_argument("--models", type=Path, default=Path("build/token_clustering"))
    options = parser.parse_args(argv)
    if not 0 <= options.at <= Recipe.depth:
        parser.error(f"--at: expected 0 to {Recipe.depth}, got {options.at}")
    recipe = Recipe(seed=options.seed, steps=tuple(options.steps))
    model = trained(recipe, options.models, print)
    at, grid, test = options.at, tuple(options.grid), scenes_of("test", seed=options.seed)
    print(f"full      {miou(model, test, options.scenes):6.2f} % mIoU of {options.scenes} scenes")
    answers: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(
            clustered, model, at=at, grid=grid, temperature=options.temperature, reconstruction=name
        )
        for name in RECONSTRUCTIONS
    }
    answers["pooled"] = partial(pooled, model, at=at, grid=grid)
    for name, answer in answers.items():
        print(f"{name:9} {miou(answer, test, options.scenes):6.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
