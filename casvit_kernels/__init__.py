"""Fused kernels for CAS-ViT's convolutional additive token mixer (arXiv 2408.03703)."""

from ._version import __version__
from .backends import BackendStatus, BackendUnavailable, backends, use_backend
from .functional import GateWeights, MixerWeights, catm
from .module import FusedCATM, UnfusedWarning
from .ops.mixer.reference import AdditiveTokenMixer
from .ops.mixer.triton.precompile import precompile
from .surgery import (
    Fold,
    FoldReport,
    FusedNetwork,
    FuseReport,
    NetworkUnsupported,
    Refusal,
    Unfolded,
    UnfuseReport,
    fold_for_inference,
    fuse,
    fuse_network,
    unfuse,
)

__all__ = [
    "AdditiveTokenMixer",
    "BackendStatus",
    "BackendUnavailable",
    "Fold",
    "FoldReport",
    "FuseReport",
    "FusedCATM",
    "FusedNetwork",
    "GateWeights",
    "MixerWeights",
    "NetworkUnsupported",
    "Refusal",
    "Unfolded",
    "UnfuseReport",
    "UnfusedWarning",
    "__version__",
    "backends",
    "catm",
    "fold_for_inference",
    "fuse",
    "fuse_network",
    "precompile",
    "unfuse",
    "use_backend",
]
