"""The figures of a run: two CSV files, and TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casvit_kernels._optional import need

from .problem import Problem

TRAIN = ("step", "epoch", "size", "images", "loss", "lr", "images_per_second")
VAL = ("step", "epoch", "top1", "top5", "ema_top1", "ema_top5")


class Csv:
    """A CSV file that is only ever appended to; every row is on its way to the disk at once.

    Args:
        path: of the file.
        columns: its header.
        length: bytes to keep of the file there (rows written after the checkpoint that the run
            continues from are dropped), None to begin a new one.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], length: int | None) -> None:
        self._path, self._columns = path, columns
        try:
            self._file = path.open("ab", buffering=0)
            self._file.truncate(min(length or 0, self._file.tell()))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise Problem(f"{path}: cannot be written: {error.strerror}") from error
        if self._file.tell() == 0:
            self._append(columns)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append the columns' values; numbers so that they read back exactly."""
        self._append(["" if row[name] is None else row[name] for name in self._columns])

    def sync(self) -> int:
        """Wait until all is on the disk; its bytes."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise Problem(f"{self._path}: cannot be written: {error.strerror}") from error
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def _append(self, values: Any) -> None:
        line = (",".join(map(str, values)) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(0, "the disk is full")
        except OSError as error:
            raise Problem(f"{self._path}: cannot be written: {error.strerror}") from error


class Logs:
    """``train.csv``, ``val.csv`` and, if wanted, TensorBoard's files, all in one directory.

    Args:
        directory: exists.
        lengths: what `lengths` said at the checkpoint that the run continues from, else empty.
        step: of that checkpoint; TensorBoard hides what came later.
        tensorboard: whether to write for TensorBoard too.
        train, val: columns of the two files.
    """

    def __init__(
        self,
        directory: Path,
        lengths: Mapping[str, int],
        step: int,
        tensorboard: bool,
        train: tuple[str, ...] = TRAIN,
        val: tuple[str, ...] = VAL,
    ) -> None:
        self._board = (
            need("torch.utils.tensorboard", "train").SummaryWriter(
                str(directory / "tensorboard"), purge_step=step + 1
            )
            if tensorboard
            else None
        )
        self._files = {
            name: Csv(directory / f"{name}.csv", columns, lengths.get(name))
            for name, columns in (("train", train), ("val", val))
        }

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row to ``train`` or ``val``."""
        self._files[name].write(row)
        if self._board is not None:
            for key, value in row.items():
                if key not in ("step", "epoch") and value is not None:
                    self._board.add_scalar(f"{name}/{key}", value, row["step"])

    def lengths(self) -> dict[str, int]:
        """Bytes of each CSV file, all of them on the disk."""
        return {name: file.sync() for name, file in self._files.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
