"""Changes to models: `fuse.py` swaps mixers in place, `fold.py` multiplies BatchNorms into a copy.

`network.py` makes a whole network one call; `find.py`, `reading.py` and `graph.py` find it in a model.
"""

from .fold import Fold, FoldReport, Unfolded, fold_for_inference
from .fuse import FuseReport, Refusal, UnfuseReport, fuse, unfuse
from .network import FusedNetwork, NetworkUnsupported, fuse_network

__all__ = [
    "Fold",
    "FoldReport",
    "FuseReport",
    "FusedNetwork",
    "NetworkUnsupported",
    "Refusal",
    "Unfolded",
    "UnfuseReport",
    "fold_for_inference",
    "fuse",
    "fuse_network",
    "unfuse",
]
