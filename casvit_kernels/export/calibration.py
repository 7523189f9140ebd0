"""Images from which 8-bit exports take the ranges of values."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from .. import photographs
from .._optional import MissingExtra
from .inputs import resized
from .prepare import Prepared

FEW = 32  # fewer images than this are pointed out


def images(
    prepared: Prepared, calibration: Tensor | str | os.PathLike[str] | None
) -> tuple[Tensor, str]:
    """What to calibrate with, as an input of the model, and a note.

    Raises:
        TypeError, ValueError: they do not fit the model, or none are at hand.
    """
    shape = tuple(prepared.example.shape[1:])
    if isinstance(calibration, Tensor):
        x = calibration.detach().cpu()
        if not x.dtype.is_floating_point or tuple(x.shape[1:]) != shape or not len(x):
            raise ValueError(
                f"calibration: expected floating images of shape (N, {', '.join(map(str, shape))}), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        return x.float(), f"calibrated with {_number(len(x))}"
    if calibration is not None and not isinstance(calibration, (str, os.PathLike)):
        raise TypeError(
            f"calibration: expected a tensor or a directory, got {type(calibration).__name__}"
        )
    if len(shape) != 3 or shape[0] != 3:
        raise ValueError(
            f"calibration: expected a tensor for a model of input shape {shape}: "
            "pictures have 3 channels"
        )
    try:
        folder = None if calibration is None else Path(calibration)
        found = photographs.load(folder, "calibration")
    except MissingExtra as error:
        raise ValueError(f"calibration: expected images of your own: {error}") from None
    x = resized(found.pixels, shape[1:], prepared.normalize)
    of = "photographs that ship with packages" if calibration is None else str(calibration)
    return x, f"calibrated with {_number(len(x))} of {of}"


def _number(count: int) -> str:
    return f"{count} images" + (" (some hundred are better)" if count < FEW else "")
