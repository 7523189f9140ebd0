"""Where operations are computed: which backends there are, which are usable here, and the choice.

Knows no operation. May import: torch.
"""

from .base import Backend, BackendUnavailable, Problem
from .registry import (
    ENVIRONMENT,
    BackendStatus,
    Choice,
    backends,
    check_name,
    explain,
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
    "Choice",
    "Problem",
    "backends",
    "check_name",
    "explain",
    "first_choice",
    "get",
    "select",
    "use_backend",
]
