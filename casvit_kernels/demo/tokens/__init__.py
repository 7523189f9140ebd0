"""Token clustering drawn over photographs: the clusters, the feature map with and without, the speed."""

from .run import Options, TokensDemo

__all__ = ["Options", "TokensDemo"]
