"""Compares an ONNX file with its model by running it in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..._optional import need
from ...testing.numerics import against_truth, rms_of
from ..prepare import Prepared
from ..report import ExportError
from . import quantize
from .runtime import session_options
from .write import Dynamic

# An fp32 or fp16 file may be off by this many times what PyTorch itself loses in float32 ...
FACTOR = 10.0
# ... or by about a hundred roundings of float32, ten of float16, of the largest output.
FLOORS = {"fp32": 1e-5, "fp16": 1e-2}
MOST = 32  # images of the calibration that an 8-bit file is checked on


class _Range(TorchDispatchMode):
    """Records the first result outside the range of float16."""

    beyond: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in _pytree.tree_leaves(result):
            if self.beyond is None and isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.look(leaf, f"{func.name().removeprefix('aten::')} gives")
        return result

    def look(self, value: Tensor, what: str) -> None:
        finite = value[value.isfinite()]  # a mask of infinities stays one
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        if largest > torch.finfo(torch.float16).max:
            self.beyond = f"{what} {largest:.3g}"


def check_range(prepared: Prepared) -> None:
    """Refuse a model whose values overflow in fp16.

    A run on the CPU would not show it: ONNX Runtime computes half precision in float32 there.
    """
    pictures, _ = prepared.pictures()
    for x, _ in ((prepared.example, 0), *_full_batches(prepared, pictures)):
        seen = _Range()  # type: ignore[no-untyped-call]
        seen.look(x, "the input has")
        with torch.no_grad(), seen:
            prepared.exported(x)
        if seen.beyond is not None:
            raise ExportError(
                f"the model overflows in fp16: {seen.beyond}, half precision ends at 65504; "
                'precision="fp32" has more range'
            )


class Found:
    """Errors so far, over all outputs and inputs compared."""

    def __init__(self) -> None:
        self.worst: float | None = None
        self.total = 0.0
        self.count = 0
        self.images = 0
        self.same = 0

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def top1(self) -> float | None:
        return self.same / self.images if self.images else None


def verify(
    prepared: Prepared,
    draft: Path,
    dynamic: Dynamic,
    precision: str,
    calibration: Tensor | None,
    notes: list[str],
) -> Found:
    """Run the file and compare every output with the float64 model.

    Args:
        prepared: the model.
        draft: the file.
        dynamic: which sizes are free; a free one is tried with several values.
        precision: one of `PRECISIONS` of `to_onnx`; sets the tolerance.
        calibration: images of an 8-bit file; None for the others.
        notes: what was compared is appended.

    Raises:
        ExportError: the file does not run, or its numbers are not the model's.
    """
    runtime = need("onnxruntime", "export")
    try:
        session = runtime.InferenceSession(
            str(draft), session_options(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the exported file: {error}") from error
    found = Found()
    pictures, note = prepared.pictures()
    if calibration is not None:  # the user's own images
        pictures, note = calibration[:MOST], "checked on images of the calibration"
    notes.append(note)
    for x in (prepared.example, *_noise(prepared, dynamic)):
        if calibration is None:
            compare(prepared, session, x, precision, found)
        else:  # noise exceeds the calibrated ranges: compare on images of that batch and size
            _run(prepared, session, x)
            compare(prepared, session, _of_shape(calibration, x.shape), precision, found)
    for x, new in _full_batches(prepared, pictures):
        compare(prepared, session, x, precision, found, new)
    return found


def _full_batches(prepared: Prepared, pictures: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """Batches of the example's size, filled up with the first pictures; and how many are new in each."""
    if pictures is None:
        return
    count = prepared.example.shape[0]
    for start in range(0, len(pictures), count):
        yield (
            pictures[torch.arange(start, start + count) % len(pictures)],
            min(count, len(pictures) - start),
        )


def _of_shape(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images resized to ``shape``; the first ones repeat where there are too few."""
    chosen = images[torch.arange(shape[0]) % len(images)]
    if chosen.dim() == 4 and chosen.shape[2:] != shape[2:]:
        chosen = F.interpolate(chosen, size=shape[2:], mode="bilinear", antialias=True)
    return chosen


def _noise(prepared: Prepared, dynamic: Dynamic) -> Iterable[Tensor]:
    count, *rest = prepared.example.shape
    noise = prepared.noise(count, *rest)
    if not torch.equal(noise, prepared.example):  # the caller gave the example
        yield noise
    if dynamic.batch:
        for n in (1, count + 2):
            yield prepared.noise(n, *rest)
    if dynamic.size:
        channels, height, width = rest
        for size in ((height + 32, width), (height + 17, width + 40)):
            yield prepared.noise(count, channels, *size)


def _run(prepared: Prepared, session: Any, x: Tensor) -> list[Tensor]:
    try:
        results = session.run(prepared.output_names, {"input": x.numpy()})
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run the exported file on {tuple(x.shape)}: {error}"
        ) from error
    return [torch.from_numpy(result) for result in results]


def compare(
    prepared: Prepared, session: Any, x: Tensor, precision: str, found: Found, images: int = 0
) -> None:
    """Run one batch, judge its outputs and add them to ``found``.

    The first ``images`` of the batch count for the share of equal top classes.
    """
    results = _run(prepared, session, x)
    with torch.no_grad():
        truth = prepared.truth(x.double())
        eager = prepared.plain(x)
    for name, got, own, expected in zip(prepared.output_names, results, eager, truth, strict=True):
        if got.shape != expected.shape:
            raise ExportError(
                f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
            )
        difference = (got.double() - expected).abs()
        _judge(name, got, own, expected, precision)
        found.worst = max(found.worst or 0.0, float(difference.max()))
        found.total += float(difference.sum())
        found.count += difference.numel()
        if "classes" in prepared.metadata:
            found.images += images
            found.same += int((got.argmax(1) == expected.argmax(1))[:images].sum())


def _judge(name: str, got: Tensor, own: Tensor, expected: Tensor, precision: str) -> None:
    if (
        precision == "int8"
    ):  # a single value says little: rms over all outputs, against their spread
        spread = expected.std() if expected.numel() > 1 else expected.abs().max()
        error = rms_of(got.double() - expected)
        bound, what = float(spread) * quantize.INT8_ERROR, "root mean square "
    else:
        found = against_truth(got, own, expected)
        error, bound, what = found.largest, found.bound(FACTOR, FLOORS[precision]), ""
    if not error <= bound:
        raise ExportError(
            f"{name}: the exported file differs from the float64 reference by {what}{error:.3g}, "
            f"expected at most {bound:.3g}"
        )
