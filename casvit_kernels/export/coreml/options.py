"""Arguments of `to_coreml` that only Core ML has, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..prepare import Prepared, strides_fit
from .compress import oldest_target

Size = int | tuple[int, int]


class Options(NamedTuple):
    precision: str
    target: Any  # of coremltools
    batch: tuple[int, int]  # the smallest and the largest
    sizes: tuple[tuple[int, int], ...]  # the default one first
    image_input: bool
    labels: tuple[str, ...] | None


def batch_range(batch: int | tuple[int, int]) -> tuple[int, int]:
    """The smallest and the largest batch."""
    numbers = (batch, batch) if isinstance(batch, int) else batch
    if not (
        isinstance(numbers, (tuple, list))
        and len(numbers) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
        and numbers[0] <= numbers[1]
    ):
        what = "a pair (smallest, largest)" if isinstance(batch, tuple) else "a positive integer"
        raise ValueError(f"batch: expected {what}, got {batch!r}")
    return numbers[0], numbers[1]


def target_of(coremltools: Any, name: str | None, precision: str, calibrated: bool) -> Any:
    """coremltools' deployment target; by default the oldest that supports the precision."""
    targets = coremltools.target.__members__
    oldest = targets[oldest_target(precision, calibrated)]
    if name is None:
        return oldest
    known = [key for key, value in targets.items() if value.value >= targets["iOS15"].value]
    if name not in known:
        raise ValueError(f"deployment_target: expected one of {', '.join(known)}, got {name!r}")
    if targets[name].value < oldest.value:
        what = "calibration" if calibrated else f"precision={precision!r}"
        raise ValueError(
            f"deployment_target: {what} needs {oldest.name} or what came with it or after, "
            f"got {name!r}"
        )
    return targets[name]


def sizes_of(
    prepared: Prepared, others: Sequence[Size], flexible_batch: bool
) -> tuple[tuple[int, int], ...]:
    """All input sizes (H, W), the example's first."""
    height, width = prepared.example.shape[-2:]
    sizes = [(height, width)]
    for other in others:
        size = (other, other) if isinstance(other, int) else tuple(other)
        if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"other_sizes: expected integers or pairs (H, W), got {other!r}")
        if size not in sizes:
            sizes.append((size[0], size[1]))
    if len(sizes) > 1 and flexible_batch:
        raise ValueError("other_sizes: expected none with a range of batches, Core ML has no both")
    if len(sizes) > 128:
        raise ValueError(f"other_sizes: Core ML takes 128 sizes at most, got {len(sizes)}")
    for size in sizes[1:]:
        try:
            with strides_fit(prepared.plain), torch.no_grad():
                prepared.plain(torch.zeros(1, prepared.example.shape[1], *size))
        except Exception as error:
            raise ValueError(
                f"other_sizes: the model cannot compute an input of {size}: {error}"
            ) from error
    return tuple(sizes)


def labels_of(
    labels: Sequence[str] | None, prepared: Prepared, batch: int
) -> tuple[str, ...] | None:
    """The class labels, as many as the model has outputs."""
    if labels is None:
        return None
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"class_labels: expected a sequence of strings, got {labels!r:.60}")
    shape = prepared.outputs[0]
    if len(prepared.outputs) > 1 or len(shape) != 2 or batch != 1:
        raise ValueError(
            "class_labels: expected a model with one output (1, classes) and batch=1, "
            f"got outputs {prepared.outputs} and batch {batch}"
        )
    if len(labels) != shape[1] or len(set(labels)) != len(labels):
        raise ValueError(
            f"class_labels: expected {shape[1]} different labels, "
            f"got {len(labels)}, {len(set(labels))} of them different"
        )
    return tuple(labels)


def check_input(prepared: Prepared, options: Options) -> None:
    """Refuse an image input for a model that takes no single image."""
    if options.image_input and (
        prepared.example.dim() != 4
        or prepared.example.shape[1] not in (1, 3)
        or options.batch != (1, 1)
    ):
        raise ValueError(
            "image_input: expected one image with 1 or 3 channels, "
            f"got an input of shape {tuple(prepared.example.shape)}, batch {options.batch}"
        )
