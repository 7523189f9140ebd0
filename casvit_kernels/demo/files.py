"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def check_writable(path: Path, argument: str) -> None:
    """Find out now whether `write_whole(path, ...)` will work; leaves nothing behind.

    Raises:
        ValueError: it will not, with the reason; names `argument`.
    """
    folder = path.parent
    try:
        if path.is_dir():
            raise ValueError(f"{argument}: expected a file to write, got the directory {path}")
        if path.exists() and not path.is_file():
            raise ValueError(f"{argument}: expected a regular file to write, got {path}")
        if not folder.is_dir():
            raise ValueError(
                f"{argument}: expected a path in an existing directory, got {path} "
                f"(there is no directory {folder})"
            )
        if path.exists():
            path.open("r+b").close()
        probe = _beside(path)
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{argument}: expected a writable file, got {path} ({error.strerror})"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 `text` beside `path`, then move it into place; an interruption leaves neither."""
    temporary = _beside(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
