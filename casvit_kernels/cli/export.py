"""`casvit-kernels export`: writes a model as ONNX or as a Core ML package."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .. import export
from ..demo import network
from . import dense
from .arguments import (
    Outcome,
    Refused,
    add_model,
    add_seed,
    add_verb,
    positive,
    positive_or_dynamic,
    refusing,
)


def add(verbs: Any) -> None:
    """The parser of this verb."""
    verb = add_verb(
        verbs,
        "export",
        run,
        "write a model as ONNX or as a Core ML package",
        "Writes the network with its plain formulas, so the file needs nothing of this library. "
        "Needs casvit-kernels[export].",
        "casvit-kernels export --checkpoint xs.pth --onnx xs.onnx --coreml xs.mlpackage",
    )
    add_model(verb)
    verb.add_argument(
        "--head", choices=dense.HEADS, metavar="NAME",
        help=f"instead of the classifier one of {', '.join(dense.HEADS)}: a dense backbone's maps; of a "
        "detector the backbone with its pyramid; a segmenter (needs casvit-kernels[dense])",
    )  # fmt: skip
    verb.add_argument("--onnx", type=Path, metavar="PATH", help="write an ONNX file")
    verb.add_argument(
        "--coreml", type=Path, metavar="PATH", help="write a Core ML package (.mlpackage)"
    )
    verb.add_argument(
        "--input-size",
        type=pixels,
        default=224,
        metavar="N",
        help="pixels, N or HxW, as 800x1344 (default: %(default)s)",
    )
    verb.add_argument(
        "--batch", type=positive_or_dynamic, default=1, metavar="N",
        help="images at once, or 'dynamic' for any number (default: %(default)s)",
    )  # fmt: skip
    verb.add_argument(
        "--classes", type=positive, metavar="N",
        help="classes of the model and its checkpoint (default: 1000; with --head the published number)",
    )  # fmt: skip
    verb.add_argument("--dynamic-size", action="store_true", help="take any height and width")
    verb.add_argument(
        "--precision", metavar="NAME",
        help=f"{', '.join(export.PRECISIONS)} (default: fp32), or for Core ML also palettized "
        "(default: fp16)",
    )  # fmt: skip
    verb.add_argument(
        "--calibration", type=Path, metavar="DIR",
        help="images from which int8 takes its value ranges (default: shipped photographs)",
    )  # fmt: skip
    verb.add_argument("--opset", type=positive, metavar="N", help="of ONNX (default: 20)")
    verb.add_argument(
        "--normalize", action="store_true",
        help="put ImageNet's normalisation into the file: its input is pixels from 0 to 1",
    )  # fmt: skip
    verb.add_argument(
        "--image-input", action="store_true",
        help="Core ML: the input is an image, normalised inside",
    )  # fmt: skip
    verb.add_argument(
        "--class-labels", type=Path, metavar="FILE",
        help="Core ML: a classifier; one label a line",
    )  # fmt: skip
    verb.add_argument(
        "--pad-channels", action="store_true",
        help="Core ML: widen maps with zeros to a multiple of 8 channels",
    )  # fmt: skip
    verb.add_argument(
        "--deployment-target", metavar="NAME",
        help="Core ML: oldest system that must run it (default: iOS15; iOS16 if compressed)",
    )  # fmt: skip
    verb.add_argument("--no-fold", action="store_true", help="leave BatchNorms as they are")
    verb.add_argument(
        "--no-verify", action="store_true", help="do not compare the file's numbers with float64"
    )
    verb.add_argument("--overwrite", action="store_true", help="replace what exists")
    add_seed(verb)


def run(arguments: argparse.Namespace) -> Outcome:
    every = {
        "input_size": arguments.input_size,
        "fold": not arguments.no_fold,
        "normalize": arguments.normalize,
        "calibration": arguments.calibration,
        "overwrite": arguments.overwrite,
    }
    if arguments.precision is not None:  # else each format's own
        every["precision"] = arguments.precision
    onnx = {
        "batch": arguments.batch,
        "dynamic_size": arguments.dynamic_size,
        "verify": not arguments.no_verify,
    }
    if arguments.opset is not None:
        onnx["opset"] = arguments.opset
    targets: list[tuple[str, Path, str, Callable[..., export.ExportReport], dict[str, Any]]] = [
        (option, path, suffix, write, options)
        for option, path, suffix, write, options in (
            ("--onnx", arguments.onnx, ".onnx", export.to_onnx, {**every, **onnx}),
            ("--coreml", arguments.coreml, ".mlpackage", export.to_coreml, _coreml(arguments)),
        )
        if path is not None
    ]
    with refusing():
        if not targets:
            raise ValueError("expected --onnx PATH, --coreml PATH or both, got neither")
        for name in ("image_input", "class_labels", "pad_channels", "deployment_target"):
            if arguments.coreml is None and getattr(arguments, name):
                raise ValueError(f"--{name.replace('_', '-')}: expected --coreml PATH beside it")
        for option, path, suffix, *_ in targets:  # both, before the first is written
            if path.suffix != suffix:
                raise ValueError(f"{option}: expected a path that ends in {suffix}, got {path}")
            if not path.parent.is_dir():
                raise ValueError(f"{option}: expected an existing directory, got {path.parent}")
            if path.exists() and not arguments.overwrite:
                raise ValueError(f"{option}: {path} exists (--overwrite replaces it)")
        model = _model(arguments)
        reports: list[export.ExportReport] = []
        for _, path, _, write, options in targets:
            print(f"writing {path} ...", file=sys.stderr)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", export.UntrainedWeights)  # said below
                try:
                    reports.append(write(model, path, **options))
                except Exception:
                    for report in reports:  # that file is there and good
                        print(report, file=sys.stderr)
                    raise
    document = {
        "command": "export",
        "model": arguments.model,
        "head": arguments.head,
        "checkpoint": arguments.checkpoint and str(arguments.checkpoint),
        "files": [{**dataclasses.asdict(r), "path": str(r.path)} for r in reports],
    }
    lines = [str(report) for report in reports]
    if arguments.checkpoint is None:
        untrained = "The weights are untrained: no checkpoint was given (--checkpoint)."
        print(f"warning: {untrained}", file=sys.stderr)
        lines.append(untrained)
    return Outcome(document, "\n".join(lines))


def pixels(text: str) -> int | tuple[int, int]:
    """``"224"``, or height and width, ``"800x1344"``."""
    height, times, width = text.partition("x")
    return (positive(height), positive(width)) if times else positive(text)


def _model(arguments: argparse.Namespace) -> nn.Module:
    name, checkpoint, seed = arguments.model, arguments.checkpoint, arguments.seed
    if arguments.head is None:
        return network.build(name, checkpoint, seed, arguments.classes or 1000, whole=True)
    if arguments.head == dense.BACKBONE and arguments.classes is not None:
        raise ValueError("--classes: expected a head that has some, got --head backbone")
    return dense.build(arguments.head, name, checkpoint, seed, arguments.classes)


def _coreml(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a Core ML package takes of the options."""
    if arguments.coreml is None:
        return {}
    if not isinstance(arguments.batch, int) or arguments.dynamic_size:
        raise Refused("--coreml: expected a fixed --batch and size")
    options = {
        "input_size": arguments.input_size,
        "batch": arguments.batch,
        "fold": not arguments.no_fold,
        "normalize": arguments.normalize and not arguments.image_input,
        "image_input": arguments.image_input,
        "pad_channels": arguments.pad_channels,
        "deployment_target": arguments.deployment_target,
        "calibration": arguments.calibration,
        "verify": not arguments.no_verify,
        "overwrite": arguments.overwrite,
    }
    if arguments.precision is not None:
        options["precision"] = arguments.precision
    if arguments.class_labels is not None:
        try:
            text = arguments.class_labels.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise Refused(
                "--class-labels: expected a text file in UTF-8, a label a line, got "
                f"{arguments.class_labels} ({error})"
            ) from None
        options["class_labels"] = text.splitlines()
    return options
