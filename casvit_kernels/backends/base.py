"""What a backend is: the protocol that cpu, triton and cuda implement, and the problem they judge."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..reference import MixerWeights


class Problem(NamedTuple):
    """What a call asks for, as far as it decides whether a backend can serve it."""

    device: str  # torch device type, e.g. "cpu"
    dtype: torch.dtype  # the dtype that is computed in (autocast applied)


class Backend(Protocol):
    """One implementation of the mixer. `why_not` both selects and explains."""

    name: str

    def why_not(self, problem: Problem | None = None) -> str | None:
        """The reason why this backend cannot serve `problem` (None: any at all here), or None."""
        ...

    def pack(self, w: MixerWeights, eps: tuple[float, float], dtype: torch.dtype) -> Tensor | None:
        """The weights folded and laid out for `project_and_mix`, worth keeping between calls."""
        ...

    def project_and_mix(
        self, x: Tensor, w: MixerWeights, eps: tuple[float, float], packed: Tensor | None
    ) -> Tensor:
        """x to out with BatchNorm's running statistics, differentiable."""
        ...
