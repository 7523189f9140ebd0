"""Token clustering and reconstruction for plain ViTs in dense prediction (arXiv 2210.01035)."""

from .clusters import Clusters, cluster_tokens, reconstruct_tokens
from .expedite import expedite, unexpedite
from .modules import TokenClustering, TokenReconstruction
from .presets import PRESETS, Preset
from .report import Report

__all__ = [
    "PRESETS",
    "Clusters",
    "Preset",
    "Report",
    "TokenClustering",
    "TokenReconstruction",
    "cluster_tokens",
    "expedite",
    "reconstruct_tokens",
    "unexpedite",
]
