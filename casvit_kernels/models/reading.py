"""A checkpoint file as plain data: nothing in it is run, and nothing is unpacked unchecked."""

from __future__ import annotations

import argparse
import mmap
import os
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .._optional import need

_PLAIN = "only tensors and plain data are read, because anything else could run code"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded into this model; the message says why."""


def read(path_or_dict: object) -> tuple[str, Any]:
    """What a checkpoint is called in messages, and what it holds.

    Args:
        path_or_dict: a mapping, which is returned as it is, or the path of a file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint, or asks for more than tensors and plain data.
        TypeError: neither path nor mapping.
        MissingExtra: a safetensors file, and that package is not installed.
    """
    if isinstance(path_or_dict, Mapping):
        return "path_or_dict", path_or_dict
    path = _path(path_or_dict)
    source = str(path).encode("utf-8", "backslashreplace").decode()
    expected = f"{source}: expected a checkpoint written by torch.save"
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{expected}, got a directory")
        if not stat.S_ISREG(mode):  # a pipe would wait for its writer, a device has no end
            raise CheckpointError(f"{expected}, got a device, pipe or socket")
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, f"{expected}, got no such file", source) from None
    except OSError as error:
        raise CheckpointError(f"{expected}, got {error.strerror or error}") from error
    except UnicodeError as error:
        raise CheckpointError(f"path_or_dict: expected a path, got {path!r}: {error}") from error
    with file:
        return source, _content(file, path.suffix, source, expected)


def _path(given: object) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"path_or_dict: expected a path or a mapping, got {type(given).__name__}")
    try:
        name = os.fsdecode(given)
    except TypeError as error:  # of a __fspath__ that returns something else
        raise TypeError(f"path_or_dict: expected a path or a mapping: {error}") from error
    if not name or "\0" in name:
        raise CheckpointError(
            f"path_or_dict: expected a path, got {'one with a NUL character' if name else 'none'}: "
            f"{name!r}"
        )
    return Path(name)


def _content(file: BinaryIO, suffix: str, source: str, expected: str) -> Any:
    try:
        size = os.fstat(file.fileno()).st_size
        head = file.read(24)
        file.seek(0)
    except OSError as error:
        raise CheckpointError(f"{expected}, got {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"{expected}, got an empty file")
    # A zip archive, or a pickle of the format before it.
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        # safetensors: the length of a JSON header in eight bytes, then the header.
        header = int.from_bytes(head[:8], "little")
        if suffix.lower() == ".safetensors" or (head[8:9] == b"{" and header <= size - 8):
            return _safetensors(file, f"{source}: expected a checkpoint written by safetensors")
        raise CheckpointError(f"{expected}, got a file that begins with {head!r}")
    if head.startswith(b"PK"):
        _check_archive(file, size, expected)
    _check_pickle(file, expected)
    file.seek(0)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # What a damaged file makes the reader raise can be anything.
        raise CheckpointError(f"{expected}, got {_why_unreadable(error)}") from error


def _check_archive(file: BinaryIO, size: int, expected: str) -> None:
    """Raise before a small archive is unpacked into a large one.

    `torch.save` stores its entries as they are, so that they cannot be larger together than the file.
    Both matter: compressed entries unpack to a thousand times their size, and stored ones may lie over
    one another. The reader of torch checks neither, and unpacks an entry before it looks at it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise CheckpointError(f"{expected}, got a file that is truncated or damaged") from error
    if any(re.search(r"(^|/)(constants\.pkl$|code/)", entry.filename) for entry in entries):
        raise CheckpointError(f"{expected}, got a TorchScript archive")
    compressed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        entry = max(compressed, key=lambda entry: entry.file_size)
        raise CheckpointError(
            f"{expected}, which compresses nothing; got an archive with compressed entries, one of "
            f"{entry.compress_size:,} bytes that unpack to {entry.file_size:,}"
        )
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:
        raise CheckpointError(
            f"{expected}, got an archive whose entries claim {unpacked:,} bytes in a file of {size:,}"
        )


def _check_pickle(file: BinaryIO, expected: str) -> None:
    """Raise before a pickled call of a few bytes claims gigabytes: bytearray(10**10).

    Of what torch's restricted reader calls, it alone fills the memory that it claims. The names of
    what is called stand in the file as text, because nothing is compressed.
    """
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            claims = content.find(b"\nbytearray\n") >= 0
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{expected}, got a file that cannot be read: {error}") from error
    if claims:
        raise CheckpointError(
            f"{expected}, got one that holds a bytearray, which can claim any amount of memory"
        )


def _safetensors(file: BinaryIO, expected: str) -> Any:
    safetensors = need("safetensors.torch", "safetensors")
    try:
        return safetensors.load(file.read())
    except Exception as error:
        raise CheckpointError(
            f"{expected}, got a file that is truncated or damaged ({error})"
        ) from error


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    refused = re.search(r"(?:GLOBAL|class|type) ([A-Za-z_][\w.]*\.[\w.]*\w)", text)
    if "weights_only" in text and refused:
        return f"one that holds {refused[1]}: {_PLAIN}"
    if "TorchScript" in text:
        return "a TorchScript archive"
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "one that claims more memory than there is"
    if "PytorchStreamReader" in text or "EOF" in text or isinstance(error, EOFError):
        return "a file that is truncated or damaged"
    return "a file that is damaged or holds something else"
