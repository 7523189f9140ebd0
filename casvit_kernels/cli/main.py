"""Runs one verb: its result on stdout, everything else on stderr, and the exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from .._files import NotWritten
from ..demo.results import finite
from ..export import ExportError
from . import bench, demo, doctor, export, info, parity, plan, tokens
from .arguments import Outcome, Parser, Refused

INTERRUPTED = 130  # exit status
EXIT_STATUS = (
    "exit status: 0 fine; 1 a check failed; 2 wrong usage or input, said in one line on stderr; "
    "130 interrupted"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status. Ctrl-C ends the process with status 130."""
    status = _run(argv)
    if status == INTERRUPTED:
        # The compiler's threads would first finish the work they have queued, for minutes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    return status


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    name = f"casvit-kernels {arguments.name}"
    try:
        # Libraries print and warn as they like; stdout is for the one result.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(?!casvit_kernels)")
            logging.getLogger("torch").setLevel(logging.ERROR)
            outcome: Outcome = arguments.verb(arguments)
    except (Refused, NotWritten) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    text = outcome.text
    if arguments.json:
        text = json.dumps(finite(outcome.document), indent=2, allow_nan=False)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads it has read enough, as `head` does
        _drop_stdout()
    except OSError as error:
        _drop_stdout()
        print(f"{name}: error: stdout: {error.strerror}", file=sys.stderr)
        return 2
    return 0 if outcome.passed else 1


def _drop_stdout() -> None:
    """What is left in its buffer would be written at the exit of Python, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="casvit-kernels",
        description="Fused kernels for CAS-ViT: see them work, check them, time them, export.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"casvit-kernels {__version__}")
    verbs = parser.add_subparsers(dest="name", metavar="VERB", required=True, parser_class=Parser)
    for verb in (demo, tokens, info, doctor, parity, bench, export, plan):
        verb.add(verbs)
    return parser
