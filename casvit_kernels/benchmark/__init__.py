"""Benchmarks: `timer.py` takes turns, `candidates.py` what is timed, `gpu.py` a GPU's clock.

Whole networks on the CPU: `network_speed.py`, with `network.py` what is timed, `processes.py` and
`worker.py` a process for each, `macs.py` and `peak.py` the share of peak. `environment.py` says where.
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
    NETWORK,
    TRAINING_NAMES,
    mixer_candidates,
    model_candidates,
    model_training_candidates,
    network_of,
    output_gradient,
    training_candidates,
    training_step,
)
from .environment import environment
from .gpu import CudaStopwatch, call_time, graphed
from .macs import macs
from .network import NETWORK_NAMES, QUICK_NETWORK_NAMES, names_for, precisions
from .network_speed import Exactness, NetworkSpeed, time_network
from .peak import fma_peak
from .processes import Race, race
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
    "NETWORK",
    "NETWORK_NAMES",
    "QUICK_NETWORK_NAMES",
    "TRAINING_NAMES",
    "CudaStopwatch",
    "Exactness",
    "NetworkSpeed",
    "Race",
    "Stopwatch",
    "Timing",
    "Timings",
    "Unavailable",
    "WallStopwatch",
    "call_time",
    "environment",
    "fma_peak",
    "graphed",
    "interleave",
    "is_bf16",
    "macs",
    "mixer_candidates",
    "model_candidates",
    "model_training_candidates",
    "names_for",
    "network_of",
    "output_gradient",
    "precisions",
    "race",
    "ratio_to_best",
    "summary",
    "time_network",
    "training_candidates",
    "training_step",
]
