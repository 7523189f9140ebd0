"""Changes to models: `fuse.py` swaps mixers in place, `fold.py` multiplies BatchNorms into a copy."""

from .fold import Fold, FoldReport, Unfolded, fold_for_inference
from .fuse import FuseReport, Refusal, UnfuseReport, fuse, unfuse

__all__ = [
    "Fold",
    "FoldReport",
    "FuseReport",
    "Refusal",
    "Unfolded",
    "UnfuseReport",
    "fold_for_inference",
    "fuse",
    "unfuse",
]
