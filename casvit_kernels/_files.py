"""Files and folders that appear at their path whole or not at all: the one writer of this package."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(target: Path, overwrite: bool = True) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder to; moved there when the block ends.

    An error in the block, or Ctrl-C, leaves what was there before and nothing else.

    Raises:
        FileExistsError: `target` appeared during the block and `overwrite` is False.
        OSError: the directory of `target` cannot be written to.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"path: cannot write into the directory ({error.strerror})",
            str(target.parent),
        ) from error
    with folder as name:
        draft = Path(name, f"draft{target.suffix}")
        yield draft
        aside = Path(name, "replaced")
        try:
            if target.exists() and not overwrite:
                raise FileExistsError(f"path: {target} appeared during the export: it is kept")
            if target.is_dir():  # a directory with content cannot be replaced in one step
                target.rename(aside)
            os.replace(draft, target)
        except BaseException:
            if aside.exists():
                aside.rename(target)
            raise


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 `text`."""
    with staged(target) as draft:
        draft.write_text(text, encoding="utf-8")


def check_writable(path: Path, argument: str) -> None:
    """Find out now whether `write_text(path, ...)` will work; leaves nothing behind.

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
        probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{argument}: expected a writable file, got {path} ({error.strerror})"
        ) from None
