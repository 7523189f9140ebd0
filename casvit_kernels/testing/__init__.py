"""Parity for users and tests: `cases.py` what is checked, `parity.py` checks, `numerics.py` judges."""

from .cases import (
    BACKENDS,
    INPUTS,
    LAYOUTS,
    MODES,
    Case,
    cases,
    cover,
    lay_out,
    real_cases,
    set_mode,
)
from .numerics import FACTOR, GRADIENT_FACTOR, VANISHING_FACTOR, against_truth, poisoned
from .parity import Row, check, run, verdict

__all__ = [
    "BACKENDS",
    "FACTOR",
    "GRADIENT_FACTOR",
    "INPUTS",
    "LAYOUTS",
    "MODES",
    "VANISHING_FACTOR",
    "Case",
    "Row",
    "against_truth",
    "cases",
    "check",
    "cover",
    "lay_out",
    "poisoned",
    "real_cases",
    "run",
    "set_mode",
    "verdict",
]
