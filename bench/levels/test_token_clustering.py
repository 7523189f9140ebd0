"""Token clustering of a ViT's map, fused against the dense formula, and how it grows with the map.

Widths of ViT-S, ViT-B and ViT-L at 40 x 40 tokens (640 pixels, patches of 16) on a grid of 28 x 28, as
published for ADE20K; of ViT-L also from 14 x 14 to 64 x 64 tokens, on grids of about half as many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.harness.case import Case, Choice, Settings
from bench.harness.measure import measure
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.stepwise import Watcher
from casvit_kernels import use_backend
from casvit_kernels.ops.tokens import reference
from casvit_kernels.tokens import cluster_tokens

NAMES = GPU_NAMES = ("eager", "fused")
WIDTHS = {"vit_s": 384, "vit_b": 768, "vit_l": 1024}
PUBLISHED = 40  # tokens across
GROWTH = (14, 20, 28, 40, 52, 64)
SETTINGS = {"iterations": 5, "window": 5, "temperature": 0.02}


def grid_of(size: int) -> int:
    """Cells across: the published 28 of 40, and as near to half of the tokens for other maps."""
    return round(size * 28 / PUBLISHED)


def cases(choice: Choice) -> list[Case]:
    if choice.gpu:
        return []
    wanted = [(model, PUBLISHED) for model in WIDTHS if model != "vit_l"]
    wanted += [("vit_l", size) for size in GROWTH]
    if choice.quick:
        wanted = [("vit_s", GROWTH[0])]
    return [Case("tokens", m, None, WIDTHS[m], size, 1, "float32") for m, size in wanted]


class Dense(nn.Module):
    """The formula that compares each token with every centre."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.grid = (size, size), (grid_of(size),) * 2

    def forward(self, x: Tensor) -> Tensor:
        return reference.cluster(x, self.size, self.grid, **SETTINGS)[0]


def run(
    case: Case, names: list[str], settings: Settings, watcher: Watcher | None = None
) -> Measured:
    dense, x = Dense(case.size), tokens(case)

    def fused() -> Tensor:
        with use_backend(settings.backend):
            return cluster_tokens(x, dense.size, dense.grid, **SETTINGS).centres

    candidates: dict[str, Callable[[], object]] = {"eager": lambda: dense(x), "fused": fused}
    return measure(case, dense, x, {n: candidates[n] for n in names}, settings, watcher=watcher)


def tokens(case: Case) -> Tensor:
    """Neighbours are alike, as in a ViT, and distances as large as its temperature expects."""
    torch.manual_seed(0)
    coarse = torch.randn(case.batch, case.channels, 8, 8)
    maps = nn.functional.interpolate(coarse, case.size, mode="bilinear") * 0.5
    maps = maps + 0.2 * torch.randn_like(maps)
    return maps.flatten(2).transpose(1, 2).contiguous()


@replayed
def test_token_clustering(show: Callable[[], None]) -> None:
    show()
