"""Around a third-party converter: silence it, and find the module that it fails on."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def culprit(
    model: nn.Module,
    example: Tensor,
    attempt: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object],
) -> str:
    """The innermost submodule that the converter rejects on its own, for an error message.

    Args:
        model: a `casvit_kernels.export.prepare.Flat`.
        example: its input.
        attempt: converts one module, given the arguments it was called with; raises if it cannot.
    """
    inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        m.register_forward_pre_hook(
            lambda m, args, kwargs: inputs.setdefault(m, (args, kwargs)) and None, with_kwargs=True
        )
        for m in model.modules()
    ]
    try:
        with quiet(), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()

    def fails(module: nn.Module) -> bool:
        try:
            with quiet(), torch.no_grad():
                attempt(module, *inputs[module])
        except Exception:
            return True
        return False

    path, module = "", model.get_submodule("model")
    while True:
        for name, child in module.named_children():
            if child in inputs and fails(child):
                path, module = f"{path}.{name}".lstrip("."), child
                break
        else:
            return f"{path or 'the model'} ({type(module).__name__})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, log lines and warnings of a converter; its exceptions pass."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
