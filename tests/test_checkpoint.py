"""load_checkpoint: what it reads, what it leaves out and says, what it refuses without a trace."""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from casvit_kernels import fuse
from casvit_kernels.models import (
    CheckpointError,
    Config,
    RCViT,
    load_checkpoint,
    rcvit_s,
    rcvit_xs,
)

TINY = Config((1, 1, 2, 1), (8, 12, 16, 20))


def tiny(seed: int = 1, **options: Any) -> RCViT:
    torch.manual_seed(seed)
    return RCViT(TINY, **{"num_classes": 5, **options})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = state(model)
    yield
    assert same(before, state(model))


def refuses(model: nn.Module, source: Any, *expected: str, **options: Any) -> str:
    """The load fails with every expected text in its message and leaves the model as it was."""
    with unchanged(model), pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, source, **options)
    message = str(caught.value)
    for text in (*expected, *([str(source)] if isinstance(source, Path) else [])):
        assert text in message
    assert len(message) < 1000
    return message


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file as the published training script writes it."""
    model = tiny(seed=2)
    content = {
        "model": model.state_dict(),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=1e-3, model="tiny", output_dir="out"),
        "model_ema": tiny(seed=3).state_dict(),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_published_file(published: Path, fused: bool, as_text: bool) -> None:
    model = tiny(fused=fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_checkpoint(model, str(published) if as_text else published)
    assert same(state(model), state(tiny(seed=2)))
    assert report == (len(model.state_dict()), (), (), {})
    assert str(report) == f"loaded {report.loaded} tensors"


def test_averaged_weights(published: Path) -> None:
    model = tiny()
    load_checkpoint(model, published, use_ema=True)
    assert same(state(model), state(tiny(seed=3)))


def test_a_loaded_model_computes_what_the_saved_one_does(published: Path) -> None:
    x = torch.randn(2, 3, 40, 40)
    for fused in (False, True):
        model = tiny(fused=fused).eval()
        with torch.no_grad():
            model(x)  # a fused model must not go on with what it packed before
            load_checkpoint(model, published)
            torch.testing.assert_close(model(x), tiny(seed=2).eval()(x), rtol=1e-4, atol=1e-5)


def test_a_model_fused_afterwards(published: Path) -> None:
    model = tiny()
    fuse(model)
    load_checkpoint(model, published)
    assert same(state(model), state(tiny(seed=2)))


def test_file_of_the_old_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(tiny(seed=2).state_dict(), path, _use_new_zipfile_serialization=False)
    model = tiny()
    load_checkpoint(model, path)
    assert same(state(model), state(tiny(seed=2)))


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
def test_mappings_and_prefixes(prefix: str, wrap: Any) -> None:
    model = tiny()
    weights = {prefix + key: tensor for key, tensor in tiny(seed=2).state_dict().items()}
    load_checkpoint(model, wrap(weights))
    assert same(state(model), state(tiny(seed=2)))


def test_compiled_models() -> None:
    whole = torch.compile(tiny(), backend="eager")
    load_checkpoint(whole, tiny(seed=2).state_dict())
    assert same(state(whole._orig_mod), state(tiny(seed=2)))

    stage = tiny()
    stage.network[0] = torch.compile(stage.network[0], backend="eager")
    report = load_checkpoint(stage, tiny(seed=2).state_dict())
    assert report.missing == report.unexpected == ()
    assert list(map(torch.sum, state(stage).values())) == list(
        map(torch.sum, state(tiny(seed=2)).values())
    )


def test_distributed_models(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(tiny())
        load_checkpoint(model, tiny(seed=2).state_dict())
        assert same(state(model.module), state(tiny(seed=2)))
        assert load_checkpoint(tiny(), model.state_dict()).missing == ()
    finally:
        torch.distributed.destroy_process_group()


def test_half_precision_weights_fit() -> None:
    model = tiny()
    half = {k: t.half() if t.is_floating_point() else t for k, t in state(tiny(seed=2)).items()}
    load_checkpoint(model, half)
    assert torch.equal(model.head.weight, half["head.weight"].float())


def test_another_class_count_keeps_the_backbone(published: Path) -> None:
    model = tiny(num_classes=7)
    own_heads = {key: t for key, t in state(model).items() if "head" in key}
    with pytest.warns(
        UserWarning, match=r"left out head\.weight.*5 classes, the model 7"
    ) as caught:
        report = load_checkpoint(model, published)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    heads = {"head.weight", "head.bias", "dist_head.weight", "dist_head.bias"}
    assert set(report.skipped) == heads
    assert report.missing == report.unexpected == ()
    assert report.loaded == len(model.state_dict()) - 4
    assert "left out head.weight: the checkpoint has 5 classes, the model 7" in str(report)
    assert same(state(model), {**state(tiny(seed=2)), **own_heads})


def test_model_without_dist_head(published: Path) -> None:
    model = tiny(distillation=False)
    report = load_checkpoint(model, published)
    assert set(report.skipped) == {"dist_head.weight", "dist_head.bias"}
    assert "distillation=False" in report.skipped["dist_head.weight"]
    assert torch.equal(model.head.weight, tiny(seed=2).head.weight)


def test_dense_backbone_takes_a_classification_file(published: Path) -> None:
    model = tiny(fork_feat=True)
    own_norms = {key: t for key, t in state(model).items() if re.match(r"norm\d", key)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_checkpoint(model, published)
    assert set(report.missing) == set(own_norms)
    assert {name.split(".")[0] for name in report.skipped} == {"norm", "head", "dist_head"}
    assert all("fork_feat=True" in why for why in report.skipped.values())
    theirs = state(tiny(seed=2))
    assert same(state(model), {k: own_norms.get(k, theirs.get(k)) for k in model.state_dict()})


def test_model_without_classes(published: Path) -> None:
    report = load_checkpoint(tiny(num_classes=0), published)
    assert all("num_classes=0" in why for why in report.skipped.values())
    assert len(report.skipped) == 4


def test_not_strict_takes_a_part_and_lists_the_rest() -> None:
    model, part = tiny(), state(tiny(seed=2))
    del part["norm.bias"]
    part["extra"] = torch.zeros(1)
    refuses(model, part, "lacks 1 of the model's tensors (norm.bias)", "1 the model lacks (extra)")
    report = load_checkpoint(model, part, strict=False)
    assert (report.missing, report.unexpected) == (("norm.bias",), ("extra",))
    assert "missing in the checkpoint: norm.bias" in str(report)
    assert "unexpected in the checkpoint: extra" in str(report)
    assert torch.equal(model.head.weight, part["head.weight"])

    model = tiny()
    assert load_checkpoint(model, {"head.weight": part["head.weight"]}, strict=False).loaded == 1


def test_strict_wants_the_dist_head() -> None:
    one_head = tiny(distillation=False)
    refuses(tiny(), one_head.state_dict(), "dist_head.weight", "distillation=False")
    refuses(tiny(), tiny(fork_feat=True).state_dict(), "strict=True", "norm.weight", "norm0.weight")


@pytest.mark.parametrize("strict", [False, True])
def test_another_size_is_told_in_words(strict: bool) -> None:
    refuses(
        rcvit_xs(),
        {"model": rcvit_s(num_classes=10).state_dict()},
        "this is an rcvit_s file, the model is an rcvit_xs",
        strict=strict,
    )
    refuses(rcvit_xs(fork_feat=True), rcvit_s().state_dict(), "this is an rcvit_s file")
    refuses(tiny(), rcvit_xs().state_dict(), "this is an rcvit_xs file", "(8, 12, 16, 20)")


def test_another_architecture_is_named_by_its_keys() -> None:
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
    for strict in (False, True):
        refuses(
            rcvit_xs(), other, "another architecture", "'0.weight'", "an rcvit_xs", strict=strict
        )
    cousin = {  # shares names with the family
        "patch_embed.0.weight": torch.zeros(24, 3, 3, 3),
        "network.0.0.norm1.weight": torch.zeros(48),
        "network.0.0.pool.weight": torch.zeros(48),
        "norm.weight": torch.zeros(220),
    }
    refuses(rcvit_xs(), cousin, "another architecture", "network.0.0.norm1.weight")


def test_other_input_channels_are_told_in_words() -> None:
    refuses(tiny(), tiny(in_chans=1).state_dict(), "expected in_chans=3", "in_chans=1")


@pytest.mark.parametrize("strict", [False, True])
def test_tensors_that_do_not_fit(strict: bool) -> None:
    good = state(tiny(seed=2))
    key = "network.6.0.attn.proj.bias"
    for bad, expected in (
        (torch.zeros(21), "expected (20,), got (21,)"),
        (torch.zeros(20, dtype=torch.int64), "expected torch.float32, got torch.int64"),
        (torch.zeros(20, device="meta"), "device meta"),
        (torch.zeros(20).to_sparse(), "torch.sparse_coo"),
    ):
        refuses(tiny(), {**good, key: bad}, key, expected, strict=strict)


def test_missing_file(tmp_path: Path) -> None:
    model = tiny()
    with (
        unchanged(model),
        pytest.raises(FileNotFoundError, match=r"none\.pth: expected a checkpoint"),
    ):
        load_checkpoint(model, tmp_path / "none.pth")


def test_directory(tmp_path: Path) -> None:
    refuses(tiny(), tmp_path, "got a directory")


def test_truncated_file(published: Path) -> None:
    whole = published.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 10):
        published.write_bytes(whole[:length])
        refuses(tiny(), published, "truncated or damaged")
    published.write_bytes(b"")
    refuses(tiny(), published, "an empty file")


def test_truncated_file_of_the_old_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 10, 3):
        path.write_bytes(whole[:length])
        refuses(tiny(), path, "damaged")


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refuses(tiny(), path, "written by torch.save", "begins with b'version https")
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(256, (4096,), generator=generator).tolist())
    for start in (b"\x00", b"\x80\x02", b"PK\x03\x04"):
        path.write_bytes(start + noise)
        refuses(tiny(), path, "written by torch.save, got")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/readme.txt", "no weights here")
    refuses(tiny(), path, "written by torch.save, got")
    path.write_bytes(pickle.dumps({"model": [1, 2, 3]}))
    refuses(tiny(), path, "written by torch.save, got")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(1)], "expected a checkpoint (a mapping), got list"),
        (torch.zeros(3), "expected a checkpoint (a mapping), got Tensor"),
        ({}, "without any; its entries: none"),
        ({"epoch": 3, "lr": 0.1}, "without any; its entries: 'epoch', 'lr'"),
        ({"model": {"a": 1}}, "without any; its entries: 'a'"),
        ({"model": 3}, "expected a state dict under 'model', got int"),
        ({"model": {"a": torch.zeros(1), "b": "text"}}, "got str under 'b'"),
        ({"model": {"a": torch.zeros(1), 7: torch.zeros(1)}}, "got Tensor under 7"),
        (
            {"head.bias": torch.zeros(1), "module.head.bias": torch.zeros(1)},
            "one tensor for head.bias, got several (one as module.head.bias)",
        ),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: Any, expected: str) -> None:
    path = tmp_path / "file.pth"
    torch.save(content, path)
    refuses(tiny(), path, expected)
    if isinstance(content, dict):
        refuses(tiny(), content, "path_or_dict: ", expected)


def test_averaged_weights_that_are_not_there(published: Path) -> None:
    content = {"model": tiny(seed=2).state_dict(), "epoch": 3}
    refuses(tiny(), content, "'model_ema'", "got the entries 'model', 'epoch'", use_ema=True)
    refuses(tiny(), {**content, "model_ema": None}, "'model_ema'", use_ema=True)
    refuses(tiny(), tiny(seed=2).state_dict(), "'model_ema'", use_ema=True)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new_format", [False, True])
def test_malicious_file_is_not_run(tmp_path: Path, new_format: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "bad.pth"
    content = {"model": tiny(seed=2).state_dict(), "args": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    message = refuses(tiny(), path, "mkdir", "only tensors and plain data")
    assert "weights_only" not in message  # no advice to switch the protection off
    assert not marker.exists()

    torch.load(path, weights_only=False)  # the file would have done it
    assert marker.exists()


def test_malicious_bare_pickle_is_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "bad.pth"
    path.write_bytes(pickle.dumps({"model": Malicious(marker)}, protocol=2))
    refuses(tiny(), path, "written by torch.save, got")
    assert not marker.exists()


def test_pickled_modules_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(tiny(), path)
    refuses(tiny(), path, "casvit_kernels.models.rcvit.RCViT", "only tensors and plain data")
    refuses(tiny(), {"model": tiny()}, "expected a state dict under 'model', got RCViT")


def test_reading_leaves_the_list_of_safe_types_alone(published: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    load_checkpoint(tiny(), published)
    assert set(torch.serialization.get_safe_globals()) == before


def test_what_is_given_stays_as_it_is() -> None:
    weights = tiny(seed=2).state_dict()
    before = copy.deepcopy(weights)
    model = tiny(num_classes=7)
    with pytest.warns(UserWarning, match="left out"):
        load_checkpoint(model, weights)
    assert same(weights, before)
    with torch.no_grad():
        model.norm.weight.fill_(9)
    assert same(weights, before)  # copied, not shared


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got dict"):
        load_checkpoint({}, {})
    with pytest.raises(TypeError, match="path_or_dict: expected a path or a mapping, got int"):
        load_checkpoint(tiny(), 3)
    with torch.device("meta"):
        model = RCViT(TINY)
    with pytest.raises(CheckpointError, match="model: expected tensors with storage"):
        load_checkpoint(model, tiny().state_dict())
