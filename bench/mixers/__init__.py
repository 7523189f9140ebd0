"""The other token mixers of CAS-ViT's Figure 2, written from their papers, and what they cost."""

from .count import macs, parameters
from .efficient_additive import EfficientAdditiveAttention
from .self_attention import SelfAttention
from .separable import SeparableSelfAttention

__all__ = [
    "EfficientAdditiveAttention",
    "SelfAttention",
    "SeparableSelfAttention",
    "macs",
    "parameters",
]
