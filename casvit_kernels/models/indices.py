"""Which stages of a network an argument names, as timm reads `out_indices`."""

from __future__ import annotations

from collections.abc import Sequence


def stage_indices(
    name: str, indices: int | Sequence[int] | None, stages: int, distinct: bool = False
) -> tuple[int, ...]:
    """Indices of stages as timm takes them, counted from the first, in order.

    Args:
        name: what errors call the argument.
        indices: stages, negative from the end; or how many of the last; None for all.
        stages: how many there are.
        distinct: refuse a stage that is named twice.

    Raises:
        ValueError: a stage or a number is out of range.
        TypeError: not an integer, and no sequence of them.
    """
    if indices is None:
        indices = stages
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= stages:
            raise ValueError(f"{name}: expected 1 to {stages} of the last stages, got {indices}")
        return tuple(range(stages - indices, stages))
    if (
        not isinstance(indices, Sequence)
        or isinstance(indices, str | bytes)
        or any(isinstance(index, bool) or not isinstance(index, int) for index in indices)
    ):
        raise TypeError(f"{name}: expected an integer or a sequence of them, got {indices!r}")
    if not indices or any(not -stages <= index < stages for index in indices):
        raise ValueError(
            f"{name}: expected stages from {-stages} to {stages - 1}, at least one, got {indices!r}"
        )
    wanted = tuple(sorted({index % stages for index in indices}))
    if distinct and len(wanted) < len(indices):
        raise ValueError(f"{name}: expected each stage once, got {indices!r}")
    return wanted
