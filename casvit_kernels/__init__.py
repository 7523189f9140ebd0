"""Fused kernels for CAS-ViT's convolutional additive token mixer (arXiv 2408.03703)."""

from ._version import __version__
from .backends import BackendStatus, BackendUnavailable, backends, use_backend
from .functional import GateWeights, MixerWeights, catm
from .module import FusedCATM
from .reference import AdditiveTokenMixer
from .swap import FuseReport, Refusal, UnfuseReport, fuse, unfuse

__all__ = [
    "AdditiveTokenMixer",
    "BackendStatus",
    "BackendUnavailable",
    "FuseReport",
    "FusedCATM",
    "GateWeights",
    "MixerWeights",
    "Refusal",
    "UnfuseReport",
    "__version__",
    "backends",
    "catm",
    "fuse",
    "unfuse",
    "use_backend",
]
