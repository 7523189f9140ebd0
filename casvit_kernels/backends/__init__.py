"""Where operations are computed: which backends there are, which are usable here, and the choice.

Knows no operation. May import: torch.
"""

from .base import Backend, BackendUnavailable, Problem
from .registry import (
    ENVIRONMENT,
    BackendStatus,
    backends,
    check_name,
    first_choice,
    get,
    select,
    use_backend,
)

__all__ = [
    "ENVIRONMENT",
    "Backend",
    "BackendStatus",
    "BackendUnavailable",
    "Problem",
    "backends",
    "check_name",
    "first_choice",
    "get",
    "select",
    "use_backend",
]
