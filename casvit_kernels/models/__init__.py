"""The RCViT family of CAS-ViT and its checkpoints; known to timm when that is installed."""

from . import timm
from .checkpoint import CheckpointError, LoadReport, load_checkpoint
from .rcvit import CONFIGS, Config, RCViT, rcvit_m, rcvit_s, rcvit_t, rcvit_xs

__all__ = [
    "CONFIGS",
    "CheckpointError",
    "Config",
    "LoadReport",
    "RCViT",
    "load_checkpoint",
    "rcvit_m",
    "rcvit_s",
    "rcvit_t",
    "rcvit_xs",
]

timm.register()
