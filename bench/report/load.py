"""The JSON files under bench/results/, and which of them must not be reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bench.report import token_speed
from bench.report.accuracy import coreml_tables, onnx_table
from bench.report.dense_digits import digits_table
from bench.report.documents import SPEED, Document, ReportError
from bench.report.gate import gated
from bench.report.memory import kept_table
from bench.report.tokens import page

GATED = {*SPEED, "counters"}
KEPT = "saved_bytes.json"  # written by static/saved_bytes.py
ACCURACY = "int8_accuracy.json"  # written by accuracy/int8.py
COREML = "coreml_accuracy.json"  # written by accuracy/coreml.py
DIGITS = "dense_digits.json"  # written by accuracy/dense.py
TOKEN_VITS = "token_vits.json"  # written by accuracy/token_vits.py
TOKENS = "token_clustering.json"  # written by accuracy/tokens.py


def load(folder: Path) -> list[Document]:
    """Every results file, by name.

    Raises:
        ReportError: a file is no results file, or one whose numbers are not for reporting.
    """
    documents = []
    for path in sorted(folder.glob("*-*-*.json")):  # level, model, device
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            settings, _, _ = document["settings"], document["environment"], document["cases"]
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(
                f"{path.name}: expected a results file of bench/: {error!r}"
            ) from None
        if settings["quick"]:
            raise ReportError(f"{path.name}: a --quick run tries the machinery, it is not reported")
        if settings["backend"] == "reference":
            raise ReportError(f"{path.name}: backend 'reference' is not fused, it is not reported")
        documents.append({**document, "name": path.stem})
    return documents


def load_gpu(folder: Path) -> dict[str, dict[str, Document]]:
    """The files of `bench/gpu`: by folder (a GPU), then by part.

    Raises:
        ReportError: a file is not of `bench/gpu`, or its numbers are not for reporting: of a trial,
            of the CPU, or of sources whose parity was not checked. A case whose own parity is not
            green has the reason instead of numbers, see `gate.py`.
    """
    found: dict[str, dict[str, Document]] = {}
    for path in sorted(folder.glob("*/*.json")):
        name = f"{path.parent.name}/{path.name}"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            stamp, _, cases = document["stamp"], document["settings"], document["cases"]
            quick, device = stamp["quick"], document["environment"]["device"]
            [case["id"] for case in cases]
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{name}: expected a file of bench/gpu: {error!r}") from None
        if quick or device == "cpu":
            raise ReportError(f"{name}: a trial of the machinery, it is not reported")
        found.setdefault(path.parent.name, {})[path.stem] = document
    for gpu, parts in found.items():
        parity = parts.get("parity", {"stamp": None, "cases": []})
        for part in sorted(GATED & parts.keys()):
            if parts[part]["stamp"] != parity["stamp"]:
                raise ReportError(f"{gpu}/{part}.json: no speed without parity of its sources")
            parts[part] = gated(parts[part], parity)
    return found


def load_kept(folder: Path) -> Document | None:
    """What mixers keep for the backward; None where that was not measured."""
    return _load_one(folder / KEPT, "bench/static/saved_bytes.py", kept_table)


def load_accuracy(folder: Path) -> Document | None:
    """Top-1 of exported files; None where that was not measured."""
    return _load_one(folder / ACCURACY, "bench/accuracy/int8.py", onnx_table)


def load_coreml(folder: Path) -> Document | None:
    """How exact Core ML packages are; None where that was not measured."""
    return _load_one(folder / COREML, "bench/accuracy/coreml.py", coreml_tables)


def load_digits(folder: Path) -> Document | None:
    """Detection and segmentation of digits; None where that was not measured."""
    return _load_one(folder / DIGITS, "bench/accuracy/dense.py", digits_table)


def load_tokens(folder: Path) -> Document | None:
    """mIoU and speed of token clustering; None where that was not measured."""
    return _load_one(folder / TOKENS, "bench/accuracy/tokens.py", page)


def load_token_vits(folder: Path) -> Document | None:
    """Speed of expedited ViTs; None where that was not measured."""
    return _load_one(folder / TOKEN_VITS, "bench/accuracy/token_vits.py", token_speed.page)


def _load_one(path: Path, writer: str, table: Callable[[Document], object]) -> Document | None:
    """A script's document, if it is there.

    Raises:
        ReportError: no table can be made of it.
    """
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        table(document)
    except (
        ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, StopIteration,
    ) as error:  # fmt: skip
        raise ReportError(f"{path.name}: expected what {writer} writes: {error!r}") from None
    return dict(document)
