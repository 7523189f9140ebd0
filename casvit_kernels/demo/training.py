"""Trains a small CAS-ViT on scikit-learn's digits, with the reference and fused, from one seed."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from .._optional import need
from ..surgery import fuse

CONFIG = models.Config(layers=(1, 1, 2, 1), dims=(32, 40, 64, 96))
SIDE = 32  # pixels: the 8x8 digits, upscaled
BATCH = 64
STEPS, QUICK_STEPS = 240, 6  # fixed, not a time limit, so that curves compare
RATE, WARMUP = 2e-3, 20  # AdamW's learning rate and the steps of its warm-up


@dataclass(frozen=True)
class Run:
    """One training run."""

    losses: list[float]  # of each step
    accuracy: float  # on the test digits, in eval mode
    step_seconds: float  # median


@dataclass(frozen=True)
class Training:
    """The same training, twice."""

    images: int  # digits trained on
    test_images: int
    steps: int
    batch: int
    parameters: int
    seed: int
    reference: Run
    fused: Run
    largest_loss_difference: float
    same_predictions: int  # of test_images, the fused network against the reference


class Digits:
    """1797 handwritten digits ``(N, 1, 32, 32)``, standardised, split three to one."""

    def __init__(self, seed: int) -> None:
        bunch = need("sklearn.datasets").load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None]
        images = F.interpolate(images, SIDE, mode="bilinear", align_corners=False)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        labels = torch.from_numpy(bunch.target).long()
        cut = len(order) * 3 // 4
        train, test = order[:cut], order[cut:]
        mean, std = images[train].mean(), images[train].std()
        images = (images - mean) / std
        self.x, self.y = images[train], labels[train]
        self.test_x, self.test_y = images[test], labels[test]

    def batches(self, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` times `BATCH` images to train on, drawn with replacement, and their labels."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            chosen = torch.randint(len(self.x), (BATCH,), generator=generator)
            yield self.x[chosen], self.y[chosen]


def train_both(seed: int, quick: bool, advance: Callable[[], object]) -> Training:
    """Train the reference and the fused network from equal weights on equal batches.

    Args:
        seed: of the split, the weights and the order of the batches.
        quick: a few steps instead of `STEPS`.
        advance: called after each of the ``steps(quick)`` steps.
    """
    digits = Digits(seed)
    torch.manual_seed(seed)
    start = models.RCViT(CONFIG, num_classes=10, in_chans=1, distillation=False)
    count = steps(quick)
    learners = [Learner(start, count), Learner(start, count)]
    fuse(learners[1].model)
    for step, (x, y) in enumerate(digits.batches(count, seed)):
        # Step by step in turn, so that both meet the machine in the same state.
        for learner in learners if step % 2 else reversed(learners):
            learner.step(x, y)
        advance()
    predictions = [predict(learner.model, digits.test_x) for learner in learners]
    reference, fused = (
        Run(
            learner.losses,
            (predicted == digits.test_y).float().mean().item(),
            statistics.median(learner.seconds),
        )
        for learner, predicted in zip(learners, predictions, strict=True)
    )
    return Training(
        images=len(digits.x),
        test_images=len(digits.test_x),
        steps=count,
        batch=BATCH,
        parameters=sum(p.numel() for p in start.parameters()),
        seed=seed,
        reference=reference,
        fused=fused,
        largest_loss_difference=max(
            abs(a - b) for a, b in zip(reference.losses, fused.losses, strict=True)
        ),
        same_predictions=int((predictions[0] == predictions[1]).sum()),
    )


def steps(quick: bool) -> int:
    return QUICK_STEPS if quick else STEPS


class Learner:
    """A copy of `start` with its optimizer, schedule and records."""

    def __init__(self, start: nn.Module, count: int) -> None:
        self.model = copy.deepcopy(start).train()
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.05)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, RATE, total_steps=count, pct_start=min(0.5, WARMUP / count)
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        begun = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.seconds.append(time.perf_counter() - begun)
        self._schedule.step()
        self.losses.append(loss.item())


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The likeliest class of each image; the model is in eval mode afterwards."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in torch.split(x, BATCH)])
