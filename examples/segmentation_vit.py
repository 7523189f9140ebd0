"""A small plain ViT for semantic segmentation, trained on `scenes` in minutes on one core.

Like Segmenter with a linear head: patches, pre-norm blocks, a norm, class scores for each token,
bilinear upsampling. No class token; positions are sines, so that one set of weights serves every size.
"""

from __future__ import annotations

import hashlib
import json
import math
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
    """Everything that a trained model depends on; phases of small scenes, then whole ones."""

    width: int = 96
    depth: int = 10
    heads: int = 3
    sizes: tuple[int, ...] = (40, 64, 112)
    steps: tuple[int, ...] = (700, 200, 100)
    batches: tuple[int, ...] = (16, 8, 4)
    rate: float = 1.5e-3
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

    def attend(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What attention adds to tokens (B, N, C), and the keys' mean over heads, (B, N, C / heads).

        bias: added to the scores of each key, broadcast to (B, heads, N, N).
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2)), k.mean(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)[0]
        return x + self.mlp(self.norm2(x))


class SegmentationViT(nn.Module):
    """``(B, 1, H, W)`` to class scores ``(B, 11, H, W)``; H and W multiples of the patch."""

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
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.04)
                nn.init.zeros_(module.bias)

    def embed(
        self, images: Tensor, first: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, C) with positions, of which the first is `first`, and the map's (H, W)."""
        maps = self.stem(images - 0.4)
        size = (maps.shape[2], maps.shape[3])
        return maps.flatten(2).transpose(1, 2) + positions(size, maps.shape[1], first), size

    def scores(self, x: Tensor, size: tuple[int, int], pixels: tuple[int, int]) -> Tensor:
        maps = self.head(self.norm(x)).transpose(1, 2).unflatten(2, size)
        return F.interpolate(maps, pixels, mode="bilinear", align_corners=False)

    def forward(self, images: Tensor, first: tuple[int, int] = (0, 0)) -> Tensor:
        x, size = self.embed(images, first)
        for block in self.blocks:
            x = block(x)
        return self.scores(x, size, (images.shape[2], images.shape[3]))


def positions(size: tuple[int, int], width: int, first: tuple[int, int]) -> Tensor:
    """Sines and cosines of y and of x, (H W, width); width a multiple of 4."""
    rates = torch.exp(torch.arange(width // 4) * (-math.log(100.0) / (width // 4)))
    y, x = (torch.arange(at, at + n)[:, None] * rates for n, at in zip(size, first, strict=True))
    y, x = y[:, None].expand(-1, size[1], -1), x[None].expand(size[0], -1, -1)
    return 0.5 * torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], 2).flatten(0, 1)


def train(recipe: Recipe, told: Callable[[str], object] = lambda _: None) -> SegmentationViT:
    """The trained model in eval mode; the same for the same recipe, torch and thread count."""
    torch.manual_seed(recipe.seed)
    model = SegmentationViT(recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=sum(recipe.steps), pct_start=0.1
    )
    index = step = 0
    for size, steps, batch in zip(recipe.sizes, recipe.steps, recipe.batches, strict=True):
        most = max(1, round(5 * (size / 112) ** 2))
        scenes = Scenes("train", (size, size), recipe.seed, (1, most), (28, min(64, size)))
        for _ in range(steps):
            x, labels = scenes.batch(index, batch)
            index, step = index + batch, step + 1
            # A small scene lies anywhere in a whole one.
            spare = (recipe.sizes[-1] - size) // PATCH
            first = tuple(torch.randint(spare + 1, (2,)).tolist())
            loss = F.cross_entropy(model(x, first), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                told(f"step {step} of {sum(recipe.steps)}: loss {loss.item():.3f}")
    return model.eval()


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
