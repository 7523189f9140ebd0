"""The main job: proof on real photographs that the fused model is the same, and how fast it is."""

from .run import Demo, Options

__all__ = ["Demo", "Options"]
