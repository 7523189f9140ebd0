"""Benchmarks: `timer.py` takes turns, `candidates.py` what is timed, `gpu.py` a GPU's clock.

`environment.py` says where. Used by `bench/` and the command line.
"""

from .candidates import (
    BASELINES,
    GPU_BASELINES,
    GPU_MIXER_NAMES,
    GPU_MODEL_NAMES,
    GPU_MODEL_TRAINING_NAMES,
    GPU_TRAINING_NAMES,
    MIXER_NAMES,
    MODEL_NAMES,
    TRAINING_NAMES,
    mixer_candidates,
    model_candidates,
    model_training_candidates,
    output_gradient,
    training_candidates,
    training_step,
)
from .environment import environment
from .gpu import CudaStopwatch, call_time, graphed
from .timer import (
    BF16,
    Stopwatch,
    Timing,
    Timings,
    Unavailable,
    WallStopwatch,
    interleave,
    is_bf16,
    ratio_to_best,
    summary,
)

__all__ = [
    "BASELINES",
    "BF16",
    "GPU_BASELINES",
    "GPU_MIXER_NAMES",
    "GPU_MODEL_NAMES",
    "GPU_MODEL_TRAINING_NAMES",
    "GPU_TRAINING_NAMES",
    "MIXER_NAMES",
    "MODEL_NAMES",
    "TRAINING_NAMES",
    "CudaStopwatch",
    "Stopwatch",
    "Timing",
    "Timings",
    "Unavailable",
    "WallStopwatch",
    "call_time",
    "environment",
    "graphed",
    "interleave",
    "is_bf16",
    "mixer_candidates",
    "model_candidates",
    "model_training_candidates",
    "output_gradient",
    "ratio_to_best",
    "summary",
    "training_candidates",
    "training_step",
]
