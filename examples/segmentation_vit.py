"""A small plain ViT for semantic segmentation, trained on `scenes` in minutes on one core.

Like Segmenter with a linear head: patches, pre-norm blocks, a norm, class scores for each token,
bilinear upsampling. No class token; rotary positions, so that one set of weights serves every size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scenes import CLASSES, Scenes
from torch import Tensor, nn

from casvit_kernels import _files

PATCH = 4  # pixels across for each token


@dataclass(frozen=True)
class Recipe:
    """Everything that a trained model depends on; phases of ever larger scenes, then again."""

    width: int = 64
    depth: int = 10
    heads: int = 2
    sizes: tuple[int, ...] = (40, 72, 112, 72, 112)
    steps: tuple[int, ...] = (320, 200, 60, 200, 80)
    batches: tuple[int, ...] = (16, 6, 4, 6, 4)
    restarts: tuple[int, ...] = (0, 3)  # the phases at which rates and optimizers start anew
    rate: float = 2e-3  # AdamW's, of vectors, stem and head
    matrix_rate: float = 0.02  # Muon's, of the blocks' matrices
    seed: int = 0


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def attend(
        self, x: Tensor, places: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What attention adds to tokens (B, N, C), and the keys' mean over heads, (B, N, C / heads).

        places: y and x of the tokens, (B or 1, N, 2). bias: added to the scores of each key, broadcast
        to (B, heads, N, N).
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        angles = _angles(places, q.shape[3])
        out = F.scaled_dot_product_attention(_rotated(q, angles), _rotated(k, angles), v, bias)
        return self.proj(out.transpose(1, 2).flatten(2)), k.mean(1)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = x + self.attend(x, places)[0]
        return x + self.mlp(self.norm2(x))


def _angles(places: Tensor, width: int) -> Tensor:
    """(B or 1, 1, N, width / 2): rotary positions, half of them of y, half of x."""
    rates = 0.8 * 30.0 ** -(torch.arange(width // 4) / (width // 4))
    return (places[..., None] * rates).flatten(2)[:, None]


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, 3)
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], 3)


class SegmentationViT(nn.Module):
    """``(B, 1, H, W)`` to class scores ``(B, 11, H, W)``; H and W multiples of `PATCH`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        # Convolutions instead of one large patch, as few scenes have to do.
        half = recipe.width // 2
        self.stem = nn.Sequential(
            *(nn.Conv2d(1, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU()),
            *(nn.Conv2d(half, recipe.width, 3, 2, 1), nn.BatchNorm2d(recipe.width), nn.GELU()),
            nn.Conv2d(recipe.width, recipe.width, 1),
        )
        self.blocks = nn.ModuleList(Block(recipe.width, recipe.heads) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, CLASSES)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Tokens (B, N, C), their places (1, N, 2) and the map's (H, W)."""
        maps = self.stem(images - 0.4)
        size = (maps.shape[2], maps.shape[3])
        lines = [torch.arange(n, dtype=maps.dtype) for n in size]
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), 2).flatten(0, 1)[None]
        return maps.flatten(2).transpose(1, 2), places, size

    def scores(self, x: Tensor, size: tuple[int, int], pixels: tuple[int, int]) -> Tensor:
        maps = self.head(self.norm(x)).transpose(1, 2).unflatten(2, size)
        return F.interpolate(maps, pixels, mode="bilinear", align_corners=False)

    def forward(self, images: Tensor) -> Tensor:
        x, places, size = self.embed(images)
        for block in self.blocks:
            x = block(x, places)
        return self.scores(x, size, (images.shape[2], images.shape[3]))


def train(recipe: Recipe, told: Callable[[str], object] = lambda _: None) -> SegmentationViT:
    """The trained model in eval mode; the same for the same recipe, torch and thread count."""
    torch.manual_seed(recipe.seed)
    model = SegmentationViT(recipe)
    index = step = 0
    for first, last in itertools.pairwise((*recipe.restarts, len(recipe.sizes))):
        optimizers, schedules = _optimizers(model, recipe, sum(recipe.steps[first:last]))
        for phase in range(first, last):
            batch = recipe.batches[phase]
            scenes = scenes_of("train", recipe.sizes[phase], recipe.seed)
            for _ in range(recipe.steps[phase]):
                x, labels = scenes.batch(index, batch)
                index, step = index + batch, step + 1
                loss = F.cross_entropy(model(x), labels)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                if step % 50 == 0:
                    told(f"step {step} of {sum(recipe.steps)}: loss {loss.item():.3f}")
    return model.eval()


def _optimizers(
    model: SegmentationViT, recipe: Recipe, total: int
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """Muon for the blocks' matrices, AdamW for the rest; rates rise for 30 steps, then fall to 0."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, recipe.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, recipe.rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 30, 1 - s / total))
        for o in optimizers
    ]
    return optimizers, schedules


def scenes_of(part: str, size: int = 112, seed: int = 0) -> Scenes:
    """The scenes that the model is made for: digits of 28 to 40 pixels, up to eight on 112 x 112."""
    most = max(1, round(8 * (size / 112) ** 2))
    return Scenes(part, (size, size), seed, (1, most), (28, 40))


def trained(
    recipe: Recipe, folder: Path, told: Callable[[str], object] = lambda _: None
) -> SegmentationViT:
    """As `train`, kept in a file of `folder` that is named after the recipe."""
    name = hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:12]
    path = folder / f"segmentation-vit-{name}.pt"
    if path.is_file():
        model = SegmentationViT(recipe)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = train(recipe, told)
    folder.mkdir(parents=True, exist_ok=True)
    with _files.staged(path) as draft:
        torch.save(model.state_dict(), draft)
    return model


class IoU:
    """Mean intersection over union of the classes, over all pixels that it was shown."""

    def __init__(self) -> None:
        self.counts = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """scores: ``(B, 11, H, W)``. labels: ``(B, H, W)``."""
        pairs = labels.flatten() * CLASSES + scores.argmax(1).flatten()
        self.counts += pairs.bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)

    def mean(self) -> float:
        """Of the classes that occur in labels or answers."""
        both = self.counts.diagonal().double()
        either = self.counts.sum(0) + self.counts.sum(1) - both
        return float((both[either > 0] / either[either > 0]).mean())
