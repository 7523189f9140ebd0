"""Files and folders appear at their path whole or not at all, whenever the writer dies."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import pytest

from casvit_kernels import _files

posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def package(path, content):
    path.mkdir()
    (path / "inside").mkdir()
    (path / "inside" / "weights").write_text(content)


def content(path):
    return (path / "inside" / "weights").read_text()


def replace(target, text, after=lambda: None, **options):
    with _files.staged(target, **options) as draft:
        package(draft, text)
        after()


def fail(error):
    raise error


@pytest.fixture(params=[True, False], ids=["exchange", "two moves"])
def exchange(request, monkeypatch):
    """With and without a system call that exchanges folders."""
    if not request.param:
        monkeypatch.setattr(_files, "_renamed", lambda *_: False)
    elif sys.platform not in ("linux", "darwin"):
        pytest.skip("no such system call here")
    return request.param


def test_a_folder_is_replaced(tmp_path, exchange):
    target = tmp_path / "m.mlpackage"
    for text in ("one", "two", "three"):
        replace(target, text)
        assert content(target) == text
        assert names(tmp_path) == ["m.mlpackage"]


def test_a_folder_is_exchanged_in_one_step(tmp_path, monkeypatch):
    """At no time is there nothing at the path."""
    if sys.platform not in ("linux", "darwin"):
        pytest.skip("no such system call here")
    target = tmp_path / "m.mlpackage"
    package(target, "old")
    monkeypatch.setattr(_files.os, "rename", lambda *_: pytest.fail("moved away"))
    replace(target, "new")
    assert content(target) == "new"


@pytest.mark.parametrize("target", ["a file", "a link"])
def test_what_is_no_folder_is_replaced_by_one(tmp_path, exchange, target):
    path = tmp_path / "m.mlpackage"
    if target == "a file":
        path.write_text("old")
    else:
        package(tmp_path / "elsewhere", "old")
        path.symlink_to(tmp_path / "elsewhere")
    replace(path, "new")
    assert content(path) == "new"
    assert not path.is_symlink()
    if target == "a link":
        assert content(tmp_path / "elsewhere") == "old"


def test_an_error_in_the_block_leaves_what_was_there(tmp_path, exchange):
    target = tmp_path / "m.mlpackage"
    package(target, "old")
    with pytest.raises(ZeroDivisionError):
        replace(target, "new", after=lambda: 1 / 0)
    assert content(target) == "old"
    assert names(tmp_path) == ["m.mlpackage"]


def test_an_error_in_the_move_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "m.mlpackage"
    package(target, "old")
    monkeypatch.setattr(_files, "_renamed", lambda *_: False)
    rename = os.rename

    def broken(source, to):
        if "draft" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, to)

    monkeypatch.setattr(_files.os, "rename", broken)
    with pytest.raises(_files.NotWritten, match=r"^path: .*m\.mlpackage was not written: Input"):
        replace(target, "new")
    assert content(target) == "old"
    assert names(tmp_path) == ["m.mlpackage"]


def test_what_appears_meanwhile_is_kept(tmp_path, exchange, monkeypatch):
    target = tmp_path / "m.mlpackage"
    with pytest.raises(FileExistsError, match=r"^path: .* appeared during the export: it is kept$"):
        replace(target, "mine", lambda: package(target, "somebody else's"), overwrite=False)
    assert content(target) == "somebody else's"
    assert names(tmp_path) == ["m.mlpackage"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no such system call here")
def test_what_appears_in_the_last_moment_is_kept(tmp_path, monkeypatch):
    target = tmp_path / "m.txt"
    target.write_text("somebody else's")
    monkeypatch.setattr(_files.os.path, "lexists", lambda path: False)
    with (
        pytest.raises(FileExistsError, match="appeared during the export"),
        _files.staged(target, overwrite=False) as draft,
    ):
        draft.write_text("mine")
    assert target.read_text() == "somebody else's"


# A writer that is killed

# Replaces the folder argv[2] and is killed at the line of _files.py with number argv[3], in order of
# execution; argv[4]: without the system call that exchanges.
WRITER = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("_files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
from pathlib import Path
if sys.argv[4] == "two moves":
    files._renamed = lambda *_: False
left = int(sys.argv[3])

def trace(frame, event, argument):
    global left
    if frame.f_code.co_filename != sys.argv[1]:
        return None
    if event == "line":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

sys.settrace(trace)
with files.staged(Path(sys.argv[2])) as draft:
    draft.mkdir()
    (draft / "inside").mkdir()
    (draft / "inside" / "weights").write_text("new")
"""


@posix
@pytest.mark.parametrize("way", ["exchange", "two moves"])
def test_a_writer_that_is_killed_leaves_the_old_or_the_new(tmp_path, way):
    """At every line of the code that writes."""
    if way == "exchange" and sys.platform not in ("linux", "darwin"):
        pytest.skip("no such system call here")
    folder, target = tmp_path / "out", tmp_path / "out" / "m.mlpackage"
    folder.mkdir()
    seen, gaps = [], 0
    for line in range(1, 400):
        if target.exists():
            (target / "inside" / "weights").write_text("old")
        else:
            package(target, "old")
        command = [sys.executable, "-c", WRITER, _files.__file__, str(target), str(line), way]
        status = subprocess.run(command, check=False, timeout=60).returncode
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if not target.exists():
            gaps += 1
        _files.recover(target)
        seen.append(content(target))
        assert names(folder) == ["m.mlpackage"]
    assert status == 0
    assert content(target) == "new"
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)  # once the new one is there, it stays
    assert (gaps > 0) is (way == "two moves")


@posix
def test_the_next_write_brings_back_what_a_killed_one_moved_away(tmp_path):
    target = tmp_path / "m.mlpackage"
    hidden = tmp_path / ".m.mlpackage.abcd1234.part"
    hidden.mkdir()
    package(hidden / "replaced", "old")
    with pytest.raises(ZeroDivisionError):
        replace(target, "new", after=lambda: 1 / 0)
    assert content(target) == "old"
    assert names(tmp_path) == ["m.mlpackage"]


@posix
def test_only_folders_of_the_same_target_are_cleared(tmp_path):
    for name in (".a.b.abcd1234.part", ".ab.abcd1234.part", ".a..part", "a.abcd1234.part"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    (tmp_path / ".a.abcd1234.part").mkdir()
    _files.recover(tmp_path / "a")
    assert names(tmp_path) == before


def _hold(target, started, go_on):
    with _files.staged(target) as draft:
        package(draft, "first")
        started.set()
        go_on.wait(60)


@posix
def test_a_writer_at_work_is_left_alone(tmp_path):
    target = tmp_path / "m.mlpackage"
    context = multiprocessing.get_context("spawn")
    started, go_on = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(target, started, go_on))
    other.start()
    assert started.wait(60)
    replace(target, "second")
    assert content(target) == "second"
    assert len(names(tmp_path)) == 2  # the other one's hidden folder
    go_on.set()
    other.join(60)
    assert other.exitcode == 0
    assert content(target) == "first"
    assert names(tmp_path) == ["m.mlpackage"]


def test_long_names(tmp_path):
    target = tmp_path / ("n" * 250)
    _files.check_writable(target, "--output")
    _files.write_text(target, "text")
    assert target.read_text() == "text"
    assert names(tmp_path) == [target.name]


# A full disk


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENOSPC, "No space left", "/tmp/x"), r"No space left \(/tmp/x\)"),
        (PermissionError(errno.EACCES, "Permission denied", b"/x"), r"Permission denied \(/x\)"),
        (OSError("odd"), "odd"),
        (
            shutil.Error(
                [("a", "b", "[Errno 28] No space: 'b'"), ("c", "d", "[Errno 28] No space: 'd'")]
            ),
            r"\[Errno 28\] No space",
        ),
    ],
)
def test_an_os_error_names_the_target_and_the_reason(tmp_path, error, reason):
    target = tmp_path / "m.onnx"
    package(target, "old")
    with pytest.raises(
        OSError, match=rf"^--output: .*/m\.onnx was not written: {reason}$"
    ) as found:
        replace(target, "new", lambda: fail(error), argument="--output")
    assert found.value.errno == error.errno
    assert content(target) == "old"
    assert names(tmp_path) == ["m.onnx"]


def test_a_draft_is_not_named(tmp_path):
    """The hidden folder is gone when the message is read."""
    with (
        pytest.raises(OSError, match=r"m\.onnx was not written: No space left on device$"),
        _files.staged(tmp_path / "m.onnx") as draft,
    ):
        fail(OSError(errno.ENOSPC, "No space left on device", str(draft)))


LIMITED = """
import importlib.util, pathlib, resource, signal, sys
spec = importlib.util.spec_from_file_location("_files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
files.write_text(pathlib.Path(sys.argv[2]), 5000 * "x")
"""


@posix
def test_a_disk_that_takes_no_more(tmp_path):
    target = tmp_path / "r.html"
    target.write_text("old")
    command = [sys.executable, "-c", LIMITED, _files.__file__, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"path: {target} was not written: File too large")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["r.html"]
