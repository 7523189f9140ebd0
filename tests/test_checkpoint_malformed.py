"""load_checkpoint on malformed input: an error in words, the model as it was, nothing unpacked."""

from __future__ import annotations

import copy
import io
import os
import socket
import zipfile
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from casvit_kernels.models import CheckpointError, Config, RCViT, load_checkpoint

TINY = Config((1, 1, 2, 1), (8, 12, 16, 20))
KEY = "network.6.0.attn.proj.bias"  # (20,)


def tiny(seed: int = 1) -> RCViT:
    torch.manual_seed(seed)
    return RCViT(TINY, num_classes=5)


def refuses(
    source: Any, *expected: str, error: type[Exception] = CheckpointError, **options: Any
) -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as caught:
        load_checkpoint(model, source, **options)
    message = str(caught.value)
    message.encode()  # can be printed
    assert len(message) < 1500
    for text in ("expected", *expected):
        assert text in message
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


class Labelled(Tensor):
    """A tensor of somebody's own class."""


def nested(*shape: int) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def freed(*shape: int) -> Tensor:
    tensor = torch.ones(shape or 20)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake(*shape: int) -> Tensor:
    with FakeTensorMode():
        return torch.ones(shape or 20)


ODD: dict[str, Callable[[], Tensor]] = {
    "a nested tensor": nested,
    "NestedTensor": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "torch.sparse_coo": lambda: torch.ones(20).to_sparse(),
    "torch.quint8": lambda: torch.quantize_per_tensor(torch.ones(20), 0.1, 0, torch.quint8),
    "device meta": lambda: torch.ones(20, device="meta"),
    "a FakeTensor": fake,
    "a Labelled": lambda: torch.ones(20).as_subclass(Labelled),
    "whose storage was freed": freed,
    "torch.complex64": lambda: torch.ones(20, dtype=torch.complex64),
    "torch.bool": lambda: torch.ones(20, dtype=torch.bool),
    "torch.int32": lambda: torch.ones(20, dtype=torch.int32),
    "got ()": lambda: torch.ones(()),
    "got (20, 1)": lambda: torch.ones(20, 1),
    "got (1000000000000,)": lambda: torch.ones(1).expand(10**12),
}


@pytest.mark.filterwarnings("ignore")  # nested and quantized tensors warn of their future
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("expected", ODD)
def test_tensors_without_plain_values(expected: str, strict: bool) -> None:
    good = tiny(2).state_dict()
    refuses({**good, KEY: ODD[expected]()}, "path_or_dict: 1 tensors", KEY, expected, strict=strict)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "key",
    [
        "patch_embed.0.weight",
        "network.0.0.norm1.weight",
        "network.6.0.norm1.weight",
        "head.weight",
        "head.bias",
        "norm.num_batches_tracked",
    ],
)
@pytest.mark.parametrize("make", [nested, fake, freed, lambda *shape: torch.ones(1, *shape)])
def test_odd_tensors_where_the_size_is_read(key: str, make: Callable[..., Tensor]) -> None:
    good = tiny(2).state_dict()
    odd = make(*good[key].shape)
    for state in ({**good, key: odd}, {key: odd}):
        refuses(state, "path_or_dict", key, strict=False)


@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_that_are_left_out_do_not_matter() -> None:
    for make in (nested, fake, freed):
        state = {**tiny(2).state_dict(), "neck.weight": make()}
        assert load_checkpoint(tiny(), state).skipped.keys() == {"neck.weight"}
        refuses({**tiny(2).state_dict(), "other.weight": make()}, "other.weight")


def test_float8_weights_fit() -> None:
    state = {**tiny(2).state_dict(), KEY: torch.ones(20).to(torch.float8_e4m3fn)}
    model = tiny()
    load_checkpoint(model, state)
    assert torch.equal(model.state_dict()[KEY], torch.ones(20))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({None: torch.ones(1)}, "got Tensor under None"),
        ({("a", 1): torch.ones(1)}, "got Tensor under ('a', 1)"),
        ({b"head.bias": torch.ones(1)}, "got Tensor under b'head.bias'"),
        ({"\udcff\udcfe.weight": torch.ones(1)}, "\\udcff\\udcfe.weight"),
        ({"a" * 10**6: torch.ones(1)}, "aaa..."),
        ({"b" * 10**6: 3, "a": torch.ones(1)}, "got int under 'bbb"),
        ({"model": {"state_dict": {"a": torch.ones(1)}}}, "its entries: 'state_dict'"),
        ({"model": [torch.ones(1)]}, "under 'model', got list"),
        ({"model": nn.Linear(2, 2)}, "under 'model', got Linear"),
        ({"head.bias": nn.Linear(2, 2)}, "its entries: 'head.bias'"),
        ({"": torch.ones(1)}, "''"),
        ({"....": torch.ones(1)}, "'....'"),
        ({"module": torch.ones(1)}, "''"),
        ({"backbone": torch.ones(1)}, "'backbone'"),
        ({"model.ema.": torch.ones(1)}, "'model.ema.'"),
        (UserDict(), "without any"),
    ],
    ids=str,
)
@pytest.mark.parametrize("strict", [False, True])
def test_state_dicts_that_are_none(content: Any, expected: str, strict: bool) -> None:
    refuses(content, "path_or_dict: ", expected, strict=strict)
    refuses(content, "path_or_dict: ", use_ema=True, strict=strict)


def test_odd_keys_beside_good_ones() -> None:
    state = {**tiny(2).state_dict(), "\udcff.weight": torch.ones(1), "a" * 10**6: torch.ones(1)}
    refuses(state, "has 2 the model lacks (\\udcff.weight")
    report = load_checkpoint(tiny(), state, strict=False)
    str(report).encode()


class Elsewhere:
    """A path whose text is something else."""

    def __init__(self, text: Any) -> None:
        self.text = text

    def __fspath__(self) -> Any:
        return self.text


@pytest.mark.parametrize(
    ("source", "error", "expected"),
    [
        ("a\0b", CheckpointError, "NUL character: 'a\\x00b'"),
        (Path("a\0b"), CheckpointError, "NUL character"),
        ("", CheckpointError, "got none: ''"),
        ("\ud800", CheckpointError, "surrogates not allowed"),
        (b"model.pth", TypeError, "got bytes"),
        (io.BytesIO(), TypeError, "got BytesIO"),
        (None, TypeError, "got NoneType"),
        ([("a", 1)], TypeError, "got list"),
        (nn.Linear(2, 2), TypeError, "got Linear"),
        (torch.ones(1), TypeError, "got Tensor"),
        (Elsewhere(3), TypeError, "not int"),
    ],
    # Not the values: addresses in them differ between the processes that run the tests.
    ids=lambda value: type(value).__name__ if not isinstance(value, type) else value.__name__,
)
def test_arguments_that_are_no_path(source: Any, error: type[Exception], expected: str) -> None:
    refuses(source, "path_or_dict: expected a path", expected, error=error)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "none.pth",
        tmp_path / "file" / "none.pth",
        os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.pth"),
        Elsewhere(os.fsencode(tmp_path / "none.pth")),
    ):
        refuses(path, "expected a checkpoint", error=FileNotFoundError)
    refuses(tmp_path / ("a" * 1000), "expected a checkpoint", "too long")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refuses(tmp_path / "circle", "expected a checkpoint", "symbolic links")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.pth"
    torch.save(tiny(2).state_dict(), os.fsdecode(path))
    model = tiny()
    load_checkpoint(model, os.fsdecode(path))
    assert torch.equal(model.head.bias, tiny(2).head.bias)
    Path(os.fsdecode(path)).write_text("text")
    refuses(os.fsdecode(path), "\\udcff.pth: expected a checkpoint")


def test_devices_pipes_and_sockets(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in ("/dev/zero", "/dev/null", tmp_path / "pipe", tmp_path / "socket"):
            refuses(path, "expected a checkpoint", "got a device, pipe or socket")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pth"
    torch.save(tiny(2).state_dict(), path)

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refuses(path, "expected a checkpoint", "Permission denied")


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pth"
    torch.save(tiny(2).state_dict(), path)

    class Failing(io.BytesIO):
        def fileno(self) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *args: Failing())
    refuses(path, "expected a checkpoint", "Input/output error")


def repacked(path: Path, size: int, compression: int) -> None:
    """A checkpoint whose one tensor unpacks to `size` bytes of zeros."""
    small = io.BytesIO()
    torch.save({"head.bias": torch.zeros(4)}, small)
    with (
        zipfile.ZipFile(small) as source,
        zipfile.ZipFile(path, "w", compression) as target,
    ):
        for entry in source.infolist():
            if not entry.filename.endswith("data/0"):
                target.writestr(entry.filename, source.read(entry))
                continue
            with target.open(entry.filename, "w") as data:
                for _ in range(0, size, 1 << 20):
                    data.write(bytes(1 << 20))


@pytest.fixture
def nothing_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(*args: Any, **options: Any) -> Any:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", unpack)


@pytest.mark.usefixtures("nothing_is_unpacked")
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_unpacks_to_far_more(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "bomb.pth"
    repacked(path, 256 << 20, compression)
    assert path.stat().st_size < 1 << 20
    refuses(path, "compressed entries", "unpack to 268,435,456")


@pytest.mark.usefixtures("nothing_is_unpacked")
def test_an_archive_whose_entries_overlap(tmp_path: Path) -> None:
    # Every entry is stored, and all share the same bytes.
    path = tmp_path / "overlapping.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
        for name in range(1, 1000):
            entry = copy.copy(archive.infolist()[0])
            entry.filename = f"archive/data/{name}"
            archive.filelist.append(entry)
    assert path.stat().st_size < 2 << 20
    refuses(path, "claim 1,048,576,000 bytes in a file of")


@pytest.mark.usefixtures("nothing_is_unpacked")
def test_an_archive_that_lies_about_its_sizes(tmp_path: Path) -> None:
    path = tmp_path / "lying.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.infolist()[0].file_size = 1 << 40
    refuses(path, "claim 1,099,511,627,776 bytes in a file of")


class Claims:
    """Pickles as a call of a few bytes that takes a gigabyte."""

    def __reduce__(self) -> Any:
        return bytearray, (1 << 30,)


@pytest.mark.usefixtures("nothing_is_unpacked")
@pytest.mark.parametrize("new_format", [False, True])
def test_a_pickle_that_claims_memory(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "claims.pth"
    content = {"model": tiny(2).state_dict(), "more": Claims()}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    refuses(path, "a bytearray, which can claim any amount of memory")


def test_what_torch_saves_passes(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    shared = torch.zeros(20)
    state = {**tiny(2).state_dict(), KEY: shared, "network.6.0.attn.dwc.bias": shared}
    torch.save({"state_dict": state, "empty": torch.zeros(0)}, path)
    load_checkpoint(tiny(), path)


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    refuses(path, "a TorchScript archive")
