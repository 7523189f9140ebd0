"""Files and folders that appear at their path whole or not at all: the one writer of this package.

A draft is written into a hidden folder beside the target, ``.NAME.xxxxxxxx.part``, and moved from there.
A file is replaced in one step by any system. A folder is exchanged with an old one in one step where
system and file system can (Linux, macOS). Elsewhere the old one is moved into the hidden folder first: a
process that is killed between the two moves leaves nothing at the path until `recover` moves the old
one back, which runs before every write. The hidden folder is locked by its writer, so an unlocked one
was left by a process that died. May import: nothing of this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders of dead processes are left alone
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".part"
_LOCK = "lock"  # in the hidden folder: locked by its writer
_OLD = "replaced"  # in the hidden folder: what was at the target before
_NO_REPLACE, _EXCHANGE = "no replace", "exchange"
_NAMES = {"linux": "renameat2", "darwin": "renamex_np"}
_FLAGS = {
    "linux": {_NO_REPLACE: 1, _EXCHANGE: 2},
    "darwin": {_NO_REPLACE: 4, _EXCHANGE: 2},
}
# Kernel or file system do not know the flag; sandboxes answer unknown system calls with EPERM.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


class NotWritten(OSError):
    """A file or folder was not written; says which and why. What was there before is kept."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


@contextlib.contextmanager
def staged(target: Path, overwrite: bool = True, argument: str = "path") -> Iterator[Path]:
    """A path beside `target` to write a file or a folder to; moved there when the block ends.

    An error in the block, or Ctrl-C, leaves what was there before and nothing else. A process that is
    killed leaves the old or the new one at `target` (see the module).

    Args:
        target: in an existing directory.
        overwrite: False keeps what appears at `target` during the block.
        argument: begins the messages: the name under which the caller was given `target`.

    Raises:
        FileExistsError: `target` appeared during the block and `overwrite` is False.
        NotWritten: an OSError in the block or in the move, such as a full disk.
        OSError: the directory of `target` cannot be written to.
    """
    recover(target)
    try:
        folder, lock = _hidden_folder(target)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{argument}: cannot write into the directory ({error.strerror})",
            str(target.parent),
        ) from error
    try:
        draft = folder / f"draft{target.suffix}"
        yield draft
        _move(draft, target, overwrite, folder / _OLD)
    except _Appeared:
        raise FileExistsError(
            f"{argument}: {target} appeared during the export: it is kept"
        ) from None
    except OSError as error:
        reason = _reason(error, folder)
        raise NotWritten(error.errno, f"{argument}: {target} was not written: {reason}") from error
    finally:
        _clear(folder, target, lock)


def write_text(target: Path, text: str, argument: str = "path") -> None:
    """Write UTF-8 `text`; raises as `staged`."""
    with staged(target, argument=argument) as draft:
        draft.write_text(text, encoding="utf-8")


def recover(target: Path) -> None:
    """Undo what writers of `target` left behind when they were killed.

    Hidden folders are removed. An old folder that lies in one of them goes back to `target` if nothing
    is there.
    """
    prefix = _prefix(target)
    with contextlib.suppress(OSError):  # no directory, or one that cannot be read
        for entry in os.scandir(target.parent):
            middle = entry.name[len(prefix) : -len(_SUFFIX)]
            # Random letters alone: ".a.b.xxxxxxxx.part" belongs to "a.b", not to "a".
            if entry.name != f"{prefix}{middle}{_SUFFIX}" or not middle or "." in middle:
                continue
            folder = Path(entry.path)
            with contextlib.suppress(OSError):
                lock = _lock(folder)
                if lock is not None:
                    _clear(folder, target, lock)


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
        probe = folder / f"{_prefix(path)}{secrets.token_hex(4)}{_SUFFIX}"
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{argument}: expected a writable file, got {path} ({error.strerror})"
        ) from None


# The hidden folder -------------------------------------------------------------------------------


def _prefix(target: Path) -> str:
    """How the names of the target's hidden folders begin."""
    name = os.fsencode(target.name)
    if len(name) > 200:  # 255 bytes are the limit of most file systems
        return f".{hashlib.sha256(name).hexdigest()[:32]}."
    return f".{target.name}."


def _hidden_folder(target: Path) -> tuple[Path, int | None]:
    """A new one, and the descriptor that locks it (None where locks are unknown)."""
    while True:
        folder = Path(tempfile.mkdtemp(_SUFFIX, _prefix(target), target.parent))
        try:
            lock = _lock(folder)
        except OSError:
            return folder, None
        if lock is not None and folder.is_dir():
            return folder, lock
        # `recover` of another process came in between: it takes a folder without a lock for abandoned.
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a hidden folder as long as this process lives; None if another process has it.

    By a file in it: network file systems do not lock folders.

    Raises:
        OSError: the folder is gone, or the system has no such locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _clear(folder: Path, target: Path, lock: int | None) -> None:
    """Remove a hidden folder; what it was about to replace goes back if nothing took its place."""
    old = folder / _OLD
    try:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
    finally:
        if lock is not None:  # before it is removed: network file systems keep open files
            os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)


def _reason(error: OSError, folder: Path) -> str:
    """What went wrong, with the name of a file that is not in the hidden folder."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        # Of a copied tree: a list of (source, copy, "[Errno 28] No space left on device: 'copy'").
        reasons = [str(entry[-1]).partition(": '")[0] for entry in error.args[0]]
        return "; ".join(dict.fromkeys(reasons))
    reason = error.strerror or str(error)
    if error.filename is not None and folder not in Path(os.fsdecode(error.filename)).parents:
        reason += f" ({os.fsdecode(error.filename)})"
    return reason


# The move ----------------------------------------------------------------------------------------


class _Appeared(Exception):
    """There is something at the target that may not be replaced."""


def _move(draft: Path, target: Path, overwrite: bool, old: Path) -> None:
    if not overwrite:
        if os.path.lexists(target):
            raise _Appeared
        try:
            if not _renamed(draft, target, _NO_REPLACE):
                os.rename(draft, target)
        except FileExistsError:
            raise _Appeared from None
    elif not draft.is_dir() or not os.path.lexists(target):
        os.replace(draft, target)
    elif not _renamed(draft, target, _EXCHANGE):
        os.rename(target, old)  # `_clear` takes it back if the next step fails
        os.rename(draft, target)


def _renamed(source: Path, target: Path, how: str) -> bool:
    """Rename in one step with a flag that `os.rename` does not have; False where it is unknown."""
    call = _system_call()
    if call is None:
        return False
    number = call(os.fsencode(source), os.fsencode(target), how)
    if number in _UNKNOWN:
        return False
    if number:
        raise OSError(number, os.strerror(number), str(source), None, str(target))
    return True


@functools.cache
def _system_call() -> Callable[[bytes, bytes, str], int] | None:
    """renameat2 or renamex_np, as a function that gives an error number; None elsewhere."""
    flags = _FLAGS.get(sys.platform)
    if flags is None:
        return None
    library = ctypes.CDLL(None, use_errno=True)
    name, c_path = _NAMES[sys.platform], ctypes.c_char_p
    function = getattr(library, name, None)
    if function is None:  # an old C library
        return None
    if name == "renameat2":
        function.argtypes = [ctypes.c_int, c_path, ctypes.c_int, c_path, ctypes.c_uint]
        here = -100  # AT_FDCWD: paths are relative to the working directory
    else:
        function.argtypes = [c_path, c_path, ctypes.c_uint]

    def call(source: bytes, target: bytes, how: str) -> int:
        if name == "renameat2":
            failed = function(here, source, here, target, flags[how])
        else:
            failed = function(source, target, flags[how])
        return ctypes.get_errno() if failed else 0

    return call
