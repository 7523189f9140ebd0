"""The path that an export writes to: checked before anything is computed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .. import _files


@contextlib.contextmanager
def staged(
    path: str | os.PathLike[str], suffix: str, overwrite: bool, *, folder: bool
) -> Iterator[tuple[Path, Path]]:
    """The final path, and one beside it to write to, moved there when the block ends without error.

    Args:
        path: of the export's caller.
        suffix: that it must have.
        overwrite: whether what is there may be replaced.
        folder: whether a folder will be written, else a file.

    Raises:
        ValueError: ``path`` does not end in ``suffix``.
        FileExistsError: ``path`` exists and ``overwrite`` is False.
        OSError: the directory is missing or cannot be written to, or the disk is full.
    """
    final = Path(path)
    if final.suffix != suffix:
        raise ValueError(f"path: expected a name that ends in {suffix}, got {str(path)!r}")
    _files.recover(final)  # an export that was killed may have left it in a hidden folder
    if final.exists() and not overwrite:
        raise FileExistsError(f"path: {final} exists already: pass overwrite=True to replace it")
    if not final.parent.is_dir():
        raise NotADirectoryError(f"path: expected an existing directory, got {final.parent}")
    if final.is_dir() and not folder:
        raise IsADirectoryError(f"path: expected a file name, got the directory {final}")
    with _files.staged(final, overwrite) as draft:
        yield final, draft
