"""`casvit-kernels doctor`: a self-test, and what to do about what it finds."""

from __future__ import annotations

import argparse
from typing import Any

from ..demo.progress import phase
from ..doctor import checkup
from . import info
from .arguments import Outcome, add_verb


def add(verbs: Any) -> None:
    """The parser of this verb."""
    verb = add_verb(
        verbs,
        "doctor",
        run,
        "find what is wrong with the installation, the threads or the machine, and say what to do",
        "Looks for common mistakes, checks each backend that is usable here against float64, and holds "
        "the speed of two mixers against the committed figures; about a minute on two cores. Notes "
        "may be meant; the exit status is 1 where there is a problem. In a process of your own: "
        "print(casvit_kernels.doctor.checkup()) after 'import casvit_kernels.doctor'.",
        "casvit-kernels doctor --quick",
    )
    verb.add_argument(
        "--quick", action="store_true", help="only look: nothing is computed, nothing is timed"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    if arguments.quick:
        found = checkup(quick=True)
    else:
        with phase("doctor") as bar:
            found = checkup(progress=bar.reach)
    document = {
        "command": "doctor",
        "passed": found.passed,
        "findings": [finding._asdict() for finding in found.findings],
        **info.document(),
    }
    return Outcome(document, str(found), found.passed)
