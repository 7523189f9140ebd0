"""Token clustering and reconstruction for plain ViTs in dense prediction (arXiv 2210.01035)."""

from .clusters import Clusters, cluster_tokens, reconstruct_tokens
from .modules import TokenClustering, TokenReconstruction

__all__ = [
    "Clusters",
    "TokenClustering",
    "TokenReconstruction",
    "cluster_tokens",
    "reconstruct_tokens",
]
