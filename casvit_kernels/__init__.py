"""Fused kernels for CAS-ViT's convolutional additive token mixer (arXiv 2408.03703)."""

from ._version import __version__
from .backends import BackendStatus, BackendUnavailable, backends, use_backend
from .folding import Fold, FoldReport, Unfolded, fold_for_inference
from .functional import GateWeights, MixerWeights, catm
from .module import FusedCATM
from .reference import AdditiveTokenMixer
from .swap import FuseReport, Refusal, UnfuseReport, fuse, unfuse

__all__ = [
    "AdditiveTokenMixer",
    "BackendStatus",
    "BackendUnavailable",
    "Fold",
    "FoldReport",
    "FuseReport",
    "FusedCATM",
    "GateWeights",
    "MixerWeights",
    "Refusal",
    "Unfolded",
    "UnfuseReport",
    "__version__",
    "backends",
    "catm",
    "fold_for_inference",
    "fuse",
    "unfuse",
    "use_backend",
]
