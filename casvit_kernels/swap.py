"""fuse(model) / unfuse(model)."""
from typing import Any
from torch import nn
class FuseReport: ...
def refusal(m: nn.Module) -> str | None: return None
def fuse(model: nn.Module, backend: str | None = None) -> Any: raise NotImplementedError
def unfuse(model: nn.Module) -> Any: raise NotImplementedError
