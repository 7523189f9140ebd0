"""Benchmarks: `timer.py` takes turns, `candidates.py` what is timed, `environment.py` where.

Used by `bench/` and the command line.
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
from .timer import (
    BF16,
    CudaStopwatch,
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
    "environment",
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
