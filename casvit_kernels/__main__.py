"""The command line: ``python -m casvit_kernels VERB`` or ``casvit-kernels VERB``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from . import __version__, benchmark, demo, export, models, testing
from .backends import BackendUnavailable, Problem, backends, check_name, cpu, select
from .demo import bench, network, text
from .demo.progress import phase
from .demo.results import finite

DTYPES = ("float32", "bfloat16", "float16", "float64")
INTERRUPTED = 130  # exit status
EXIT_STATUS = (
    "exit status: 0 fine; 1 a check failed; 2 wrong usage or input, said in one line on stderr; "
    "130 interrupted"
)


class Refused(Exception):
    """Wrong input: one line for the user, exit status 2."""


class Outcome(NamedTuple):
    """What a verb found out."""

    document: dict[str, Any]  # for --json
    text: str  # for people
    passed: bool = True


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
    except Refused as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except export.ExportError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(finite(outcome.document), indent=2, allow_nan=False))
    else:
        print(outcome.text)
    return 0 if outcome.passed else 1


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """For the part of a verb that judges its input: what is raised in it is the user's to mend."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, BackendUnavailable) as error:
        raise Refused(str(error)) from error


def run_demo(arguments: argparse.Namespace) -> Outcome:
    with refusing():
        job = demo.Demo(
            demo.Options(
                model=arguments.model,
                checkpoint=arguments.checkpoint,
                images=arguments.images,
                output=arguments.output,
                threads=arguments.threads,
                quick=arguments.quick,
                train=not arguments.no_train,
                seed=arguments.seed,
            )
        )
    results = job.run()
    return Outcome(results.as_json(), text.demo(results), results.parity.passed)


def run_info(arguments: argparse.Namespace) -> Outcome:
    document: dict[str, Any] = {
        "command": "info",
        "environment": benchmark.environment(),
        "cpu_features": _cpu_features(),
        "instruction_sets": cpu.instruction_sets(),
        "backends": [status._asdict() for status in backends()],
    }
    return Outcome(document, text.info(document))


def run_parity(arguments: argparse.Namespace) -> Outcome:
    with refusing():
        check_name(arguments.backend, "--backend")
        backend = arguments.backend or _default_backend()
        reason = next(status.reason for status in backends() if status.name == backend)
        if reason is not None:
            raise ValueError(f"--backend: {backend!r} cannot run here: {reason}")
        dtypes = [getattr(torch, name) for name in arguments.dtype] if arguments.dtype else None
        testing.cases(backend, dtypes=dtypes)
    with phase("parity") as bar:
        rows = testing.run(
            backend, dtypes=dtypes, long=arguments.long, seed=arguments.seed, progress=bar.reach
        )
    passed = all(row.passed for row in rows)
    document = {
        "command": "parity",
        "environment": benchmark.environment(),
        "backend": backend,
        "passed": passed,
        "rows": [{**row._asdict(), "passed": row.passed} for row in rows],
    }
    return Outcome(document, text.parity(backend, rows), passed)


def run_bench(arguments: argparse.Namespace) -> Outcome:
    with refusing():
        _default_backend()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    found = bench.run(
        arguments.model, arguments.batch, arguments.stage, arguments.quick, arguments.seed
    )
    return Outcome(
        {"command": "bench", **dataclasses.asdict(found)}, text.bench(found), found.parity.passed
    )


def run_export(arguments: argparse.Namespace) -> Outcome:
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
        model = network.build(
            arguments.model, arguments.checkpoint, arguments.seed, arguments.classes, whole=True
        )
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
        "checkpoint": arguments.checkpoint and str(arguments.checkpoint),
        "files": [{**dataclasses.asdict(r), "path": str(r.path)} for r in reports],
    }
    lines = [str(report) for report in reports]
    if arguments.checkpoint is None:
        untrained = "The weights are untrained: no checkpoint was given (--checkpoint)."
        print(f"warning: {untrained}", file=sys.stderr)
        lines.append(untrained)
    return Outcome(document, "\n".join(lines))


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
            raise Refused(f"--class-labels: {error}") from None
        options["class_labels"] = text.splitlines()
    return options


def _default_backend() -> str:
    return select(None, Problem("cpu", torch.float32)).name


def _cpu_features() -> list[str]:
    """The instruction set extensions that matter here, by the names Linux gives them."""
    wanted = (
        "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16",
        "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "bf16", "sve", "i8mm",
    )  # fmt: skip
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((x for x in lines if x.lower().startswith(("flags", "features"))), "").split()
    return [name for name in wanted if name in flags]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="casvit-kernels",
        description="Fused kernels for CAS-ViT: see them work, check them, time them, export.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"casvit-kernels {__version__}")
    verbs = parser.add_subparsers(dest="name", metavar="VERB", required=True, parser_class=_Parser)

    verb = _verb(
        verbs,
        "demo",
        run_demo,
        "fuse a CAS-ViT, prove on photographs that it is the same, time it, write a report",
        "Takes photographs that ship with scikit-learn and scikit-image, compares the fused "
        "network with PyTorch layer by layer, measures both beside torch.compile and ONNX Runtime, "
        "trains a small CAS-ViT on handwritten digits with and without fusion, and writes one HTML "
        "file with the results. Takes some minutes; needs casvit-kernels[demo].",
        "casvit-kernels demo --images ~/Pictures --checkpoint rcvit_xs.pth",
    )
    _model(verb)
    verb.add_argument(
        "--images", type=Path, metavar="DIR", help="photographs of your own (default: shipped ones)"
    )
    verb.add_argument(
        "--output", type=Path, metavar="PATH", default=Path("casvit_report.html"),
        help="the report, replaced if it exists (default: %(default)s)",
    )  # fmt: skip
    _threads(verb)
    verb.add_argument(
        "--quick", action="store_true",
        help="seconds instead of minutes: few rounds and steps, no torch.compile, no ONNX Runtime",
    )  # fmt: skip
    verb.add_argument("--no-train", action="store_true", help="leave the training out")
    _seed(verb)

    _verb(
        verbs,
        "info",
        run_info,
        "versions, CPU features, and each backend: usable or why not",
        "Shows what a report of a problem should contain.",
        "casvit-kernels info --json",
    )

    verb = _verb(
        verbs,
        "parity",
        run_parity,
        "check a backend on this machine against PyTorch in float64",
        "Runs the checks of the test suite: layouts, modes, dtypes, odd sizes, gradients, and a "
        "random sweep. A backend passes where its error is at most twice PyTorch's own.",
        "casvit-kernels parity --backend cpu --dtype float32 --dtype bfloat16",
    )
    verb.add_argument(
        "--backend", metavar="NAME", help="which one (default: the automatic choice on the CPU)"
    )
    verb.add_argument("--long", action="store_true", help="400 random cases instead of 12")
    verb.add_argument(
        "--dtype", choices=DTYPES, action="append", metavar="DTYPE",
        help=f"only this one of {', '.join(DTYPES)}; may be repeated (default: all)",
    )  # fmt: skip
    _seed(verb)

    verb = _verb(
        verbs,
        "bench",
        run_bench,
        "time the mixers and the whole model against PyTorch, torch.compile and ONNX Runtime",
        "Checks parity first and times nothing where it fails. All implementations take turns in "
        "every round; the table shows medians, and how many times as fast as eager PyTorch.",
        "casvit-kernels bench --model rcvit_t --batch 1 --stage 1 --stage 2",
    )
    _model(verb, checkpoint=False)
    verb.add_argument(
        "--batch",
        type=_positive,
        default=8,
        metavar="N",
        help="images at once (default: %(default)s)",
    )
    verb.add_argument(
        "--stage", type=int, choices=(1, 2, 3, 4), action="append",
        help="only the mixer of this stage; may be repeated (default: all, and the whole model)",
    )  # fmt: skip
    _threads(verb)
    verb.add_argument(
        "--quick", action="store_true", help="few rounds, no torch.compile, no ONNX Runtime"
    )
    _seed(verb)

    verb = _verb(
        verbs,
        "export",
        run_export,
        "write a model as ONNX or as a Core ML package",
        "Writes the network with its plain formulas, so the file needs nothing of this library. "
        "Needs casvit-kernels[export].",
        "casvit-kernels export --checkpoint xs.pth --onnx xs.onnx --coreml xs.mlpackage",
    )
    _model(verb)
    verb.add_argument("--onnx", type=Path, metavar="PATH", help="write an ONNX file")
    verb.add_argument(
        "--coreml", type=Path, metavar="PATH", help="write a Core ML package (.mlpackage)"
    )
    verb.add_argument(
        "--input-size",
        type=_positive,
        default=224,
        metavar="N",
        help="pixels (default: %(default)s)",
    )
    verb.add_argument(
        "--batch", type=_positive_or_dynamic, default=1, metavar="N",
        help="images at once, or 'dynamic' for any number (default: %(default)s)",
    )  # fmt: skip
    verb.add_argument(
        "--classes", type=_positive, default=1000, metavar="N",
        help="classes of the model and its checkpoint (default: %(default)s)",
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
    verb.add_argument("--opset", type=_positive, metavar="N", help="of ONNX (default: 20)")
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
    _seed(verb)
    return parser


def _verb(
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


def _model(parser: argparse.ArgumentParser, checkpoint: bool = True) -> None:
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


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=_positive, metavar="N",
        help=f"of PyTorch, ONNX Runtime and the kernels (default: {torch.get_num_threads()})",
    )  # fmt: skip


def _seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of everything random (default: %(default)s)",
    )


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {value!r}")
    return int(value)


def _positive_or_dynamic(value: str) -> int | str:
    return value if value == "dynamic" else _positive(value)


if __name__ == "__main__":
    sys.exit(main())
