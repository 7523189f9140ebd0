"""Optional packages, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):
    """A package of an optional extra is not installed; the message says how to get it."""


def need(name: str, extra: str = "demo") -> Any:
    """The module `name`.

    Args:
        name: as in an import statement, dots included.
        extra: the extra of this package that brings it.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if extra == "export":
            raise MissingExtra(
                f"this export needs {name}: pip install 'casvit-kernels[export]'"
            ) from error
        if not isinstance(error, ModuleNotFoundError):
            raise  # it is installed and broken: its own message says more
        raise MissingExtra(
            f"{error.name} is needed and not installed: pip install 'casvit-kernels[{extra}]'"
        ) from None
