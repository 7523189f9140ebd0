"""What several verbs share: the parser, options, and how wrong input is refused."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from .. import models
from ..backends import BackendUnavailable, Problem, select


class Refused(Exception):
    """Wrong input: one line for the user, exit status 2."""


class Outcome(NamedTuple):
    """What a verb found out."""

    document: dict[str, Any]  # for --json
    text: str  # for people
    passed: bool = True


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """For the part of a verb that judges its input: what is raised in it is the user's to mend."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, BackendUnavailable) as error:
        raise Refused(str(error)) from error


def default_backend() -> str:
    """The automatic choice for float32 on the CPU."""
    return select(None, Problem("cpu", torch.float32)).name


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], Outcome],
    title: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=title,
        description=f"{title[0].upper()}{title[1:]}. {description}",
        epilog=f"example: {example}",
    )
    parser.set_defaults(verb=run)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else to stdout"
    )
    return parser


def add_model(parser: argparse.ArgumentParser, checkpoint: bool = True) -> None:
    parser.add_argument(
        "--model", choices=tuple(models.CONFIGS), default="rcvit_xs", metavar="NAME",
        help=f"one of {', '.join(models.CONFIGS)} (default: %(default)s)",
    )  # fmt: skip
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            type=Path,
            metavar="PATH",
            help="trained weights (default: untrained ones)",
        )


def add_images(parser: argparse.ArgumentParser) -> None:
    """--images."""
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="photographs of your own (default: shipped ones)"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=positive, metavar="N",
        help=f"of PyTorch, ONNX Runtime and the kernels (default: {torch.get_num_threads()})",
    )  # fmt: skip


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of everything random (default: %(default)s)",
    )


def positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {value!r}")
    return int(value)


def positive_or_dynamic(value: str) -> int | str:
    return value if value == "dynamic" else positive(value)
