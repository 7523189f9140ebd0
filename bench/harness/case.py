"""What can be measured: a case, a choice of cases, and the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from casvit_kernels import benchmark


@dataclass(frozen=True)
class Case:
    """What is computed; its fields are the description in the JSON."""

    level: str  # "mixer", "model"; forward and backward: "training" (mixer), "model-training"; or
    # "training-forward"; "network": whole models, each candidate in a process of its own; "dense"
    # and "dense-mixer": dense backbones and their mixers; "figure2": other mixers beside ours
    model: str  # "xs", "s", "m", "t"
    stage: int | None  # 1 to 4, None for a whole model
    channels: int  # of x
    size: int  # height and width of x
    batch: int
    dtype: str  # "float32", or "bfloat16" for autocast
    width: int | None = None  # of x, where it is another than the height

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of x."""
        return (self.batch, self.channels, self.size, self.width or self.size)

    @property
    def id(self) -> str:
        stage = "" if self.stage is None else f"-stage{self.stage}"
        size = f"{self.size}" if self.width is None else f"{self.size}x{self.width}"
        name = f"{self.model}{stage}-{size}px-b{self.batch}-{self.dtype}"
        return name + "-forward" if self.level == "training-forward" else name


class Choice(NamedTuple):
    """Which cases to measure."""

    models: tuple[str, ...] = ("xs", "t")
    batches: tuple[int, ...] = (1, 8)
    inputs: tuple[int, ...] = (224,)  # heights and widths of images
    gpu: bool = False  # what is worth measuring there: bfloat16, and steps of whole models
    quick: bool = False
    networks: tuple[str, ...] = ("xs", "s", "m", "t")  # models of the level "network"


GPU_CHOICE = Choice(("xs", "s", "m", "t"), (1, 64, 256), (224, 384), True)


@dataclass(frozen=True)
class Settings:
    rounds: int = 15
    min_round_seconds: float = 0.05
    backend: str = "cpu"
    quick: bool = False  # a trial of the machinery: its numbers are not for reporting
    device: str = "cpu"
    pause_seconds: float = 0.05
    cold: bool = True  # on a GPU: mixers are timed with an L2 cache that holds other data
    starts: int = 3  # of the level "network": how often its processes are started anew


def settings_for(device: str, backend: str, quick: bool = False) -> Settings:
    rounds, seconds = (3, 0.005) if quick else (15, 0.05)
    if device == "cpu":
        return Settings(rounds, seconds, backend, quick, starts=1 if quick else 3)
    # Device seconds: a call of a few microseconds takes the CPU a tenth of a millisecond.
    return Settings(rounds, seconds / 10, backend, quick, device, pause_seconds=0.0)


def names(level: Any, case: Case, gpu: bool) -> list[str]:
    """The candidates of one case, out of the lists of a test file."""
    if gpu and case.level == "model-training":
        known = level.TRAINING_GPU_NAMES
    else:
        known = level.GPU_NAMES if gpu else level.NAMES
    if case.dtype == "bfloat16":
        return [name + benchmark.BF16 for name in known if name != "onnxruntime"]
    return list(known)
