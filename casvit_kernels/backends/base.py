"""What a backend is: a place to compute, and the reason why it cannot be used. Knows no operation.

What a backend computes is in the folder of each operation under `ops/`, in the file of its name.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """What a call asks for, as far as it decides whether a backend can serve it."""

    device: str  #: torch device type, e.g. "cpu"
    dtype: torch.dtype  #: the dtype that is computed in (autocast applied)
    channels: int = 0  #: where they may be too many; 0 asks nothing
    ordinal: int | None = None  #: of the device among those of its type; None for any


class Backend(Protocol):
    """`why_not` selects, fills `backends()`, and is the error message."""

    name: str

    def why_not(self, problem: Problem | None = None) -> str | None:
        """The reason why this backend cannot serve `problem` (None: any at all here), or None."""
        ...


def why_not_dtype(problem: Problem) -> str | None:
    """The reason of a backend whose kernels compute `FUSED_DTYPES`."""
    if problem.dtype in FUSED_DTYPES:
        return None
    return f"it computes float32, bfloat16 and float16, not {problem.dtype}"


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot serve the call; the message says why."""
