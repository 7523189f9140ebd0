"""load_checkpoint: what trainers, detectors and segmenters write around the weights of a backbone."""

from __future__ import annotations

import copy
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casvit_kernels._optional import MissingExtra
from casvit_kernels.models import CheckpointError, Config, RCViT, load_checkpoint, rcvit_s, rcvit_xs

TINY = Config((1, 1, 2, 1), (8, 12, 16, 20))
OTHER = Config((2, 1, 2, 1), (8, 12, 24, 20))

State = dict[str, Tensor]


def tiny(seed: int = 1, config: Config = TINY, **options: Any) -> RCViT:
    torch.manual_seed(seed)
    return RCViT(config, **{"num_classes": 5, **options})


def dense(seed: int = 1, **options: Any) -> RCViT:
    return tiny(seed, fork_feat=True, **options)


def under(prefix: str, model: nn.Module) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in model.state_dict().items()}


def parts(*names: str) -> State:
    """Three tensors of each part beside a backbone."""
    return {f"{name}.convs.{i}.conv.weight": torch.ones(2, 2) for name in names for i in range(3)}


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def refuses(model: nn.Module, source: Any, *expected: str, **options: Any) -> str:
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, source, **options)
    assert same(before, model)
    for text in expected:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    "prefix",
    [
        "backbone.",
        "model.",
        "module.backbone.",
        "model.backbone.",
        "backbone.model.",
        "module.model._orig_mod.backbone.",
        "_orig_mod.module.model.",
        "model._orig_mod.module.",
        "encoder.model.",
        "_backbone.",
        "_fsdp_wrapped_module.model.",
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_prefixes_in_any_order(prefix: str, strict: bool) -> None:
    for make in (tiny, dense):
        for model in (make(), nn.Module()):
            if not isinstance(model, RCViT):  # the model may be wrapped itself
                model._orig_mod = make()
            report = load_checkpoint(model, {"state_dict": under(prefix, make(2))}, strict=strict)
            assert same(getattr(model, "_orig_mod", model), make(2))
            assert report.missing == report.unexpected == ()
            assert report.skipped == {}


def test_a_detector_of_mm(tmp_path: Path) -> None:
    path = tmp_path / "detector.pth"
    heads = parts("neck", "bbox_head", "rpn_head", "roi_head")
    torch.save({"meta": {"epoch": 12}, "state_dict": under("backbone.", dense(2)) | heads}, path)
    for strict in (False, True):
        model = dense()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = load_checkpoint(model, path, strict=strict)
        assert same(model, dense(2))
        assert (report.missing, report.unexpected) == ((), ())
        assert set(report.skipped) == set(heads)
        assert report.left_out == (
            "left out 12 tensors of neck, bbox_head, rpn_head and roi_head: the model is a backbone",
        )
        assert str(report) == f"loaded {report.loaded} tensors\n{report.left_out[0]}"


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("backbone.", ("decode_head", "auxiliary_head", "neck")),  # mmsegmentation
        ("module.backbone.", ("module.neck", "module.mask_head")),
        ("backbone.body.", ("backbone.fpn", "rpn", "roi_heads", "head")),  # torchvision
        ("encoder.model.", ("decoder", "segmentation_head")),  # segmentation-models-pytorch
        ("model.backbone.", ("model.neck", "model.bbox_head", "criterion", "loss_fn")),  # Lightning
        ("", ("neck", "decode_head")),
    ],
)
def test_parts_beside_a_backbone(prefix: str, beside: tuple[str, ...]) -> None:
    model = dense()
    report = load_checkpoint(model, under(prefix, dense(2)) | parts(*beside))
    assert same(model, dense(2))
    assert len(report.skipped) == 3 * len(beside)
    assert set(report.skipped.values()) == {"the model is a backbone"}


def test_other_parts_stay_an_error() -> None:
    state = under("backbone.", dense(2)) | parts("neck", "teacher", "model.extra")
    refuses(dense(), state, "has 6 the model lacks (teacher.convs.0", "strict=True")
    refuses(dense(), under("backbone.", dense(2)) | parts("backbone.extra"), "extra.convs.0")
    # A part of that name which the model has is no part beside it.
    refuses(tiny(), tiny(2).state_dict() | {"head.scale": torch.ones(1)}, "(head.scale)")
    model = dense()
    report = load_checkpoint(model, state, strict=False)
    assert same(model, dense(2))
    assert [name.split(".")[0] for name in report.unexpected] == ["teacher"] * 3 + ["model"] * 3
    assert len(report.skipped) == 3


def test_a_classifier_does_not_take_a_backbone_alone() -> None:
    state = under("backbone.", tiny(2, num_classes=0)) | {"head.fc.weight": torch.ones(5, 20)}
    refuses(tiny(), state, "lacks 4 of the model's tensors (head.weight")
    model = tiny()
    report = load_checkpoint(model, state, strict=False)
    assert report.skipped == {"head.fc.weight": "the model has no such part"}
    assert len(report.missing) == 4


@pytest.mark.parametrize("prefix", ["model.", "model.module.", "net.", ""])
def test_lightning(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "last.ckpt"
    state = under(prefix, tiny(2)) | {"criterion.weight": torch.ones(5)}
    torch.save({"epoch": 3, "state_dict": state, "pytorch-lightning_version": "2.5"}, path)
    model = tiny()
    report = load_checkpoint(model, path)
    assert same(model, tiny(2))
    assert report.skipped == {"criterion.weight": "the model has no such part"}


def test_averaged_model_of_torch() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny(2))
    averaged.update_parameters(tiny(2))
    for content, use_ema in (
        (averaged.state_dict(), False),
        (averaged.state_dict(), True),
        ({"model": averaged.state_dict()}, False),
        ({"model": tiny(3).state_dict(), "model_ema": averaged.state_dict()}, True),
        ({"state_dict": tiny(3).state_dict(), "ema_state_dict": averaged.state_dict()}, True),
    ):
        model = tiny()
        report = load_checkpoint(model, content, use_ema=use_ema)
        assert same(model, tiny(2))
        assert report.skipped == {"n_averaged": "it counts averaged weights"}


@pytest.mark.parametrize("average", ["model_ema.", "ema_model.module.", "ema.", "swa_model."])
def test_averages_in_the_state_dict_itself(average: str) -> None:
    state = under("model.", tiny(2)) | under(average, tiny(3))
    for use_ema, seed, why in (
        (False, 2, "averaged weights (use_ema=True reads them)"),
        (True, 3, "weights that are not averaged (use_ema=False reads them)"),
    ):
        model = tiny()
        report = load_checkpoint(model, {"state_dict": state}, use_ema=use_ema)
        assert same(model, tiny(seed))
        assert set(report.skipped.values()) == {why}
        assert len(report.skipped) == len(model.state_dict())
    refuses(tiny(), under(average, tiny(3)), "averaged ones only", "use_ema=True reads them")
    refuses(tiny(), under("model.", tiny(3)), "use_ema expected averaged weights", use_ema=True)


def test_the_hook_of_mm_that_averages() -> None:
    backbone = under("backbone.", dense(2))
    buffers = {f"ema_{key.replace('.', '_')}": tensor for key, tensor in backbone.items()}
    model = dense()
    report = load_checkpoint(model, {"state_dict": backbone | buffers})
    assert same(model, dense(2))
    assert set(report.skipped) == set(buffers)


def test_an_average_alone_is_named() -> None:
    content = {"model_ema": tiny(2).state_dict(), "epoch": 3}
    refuses(tiny(), content, "entries: 'model_ema', 'epoch'", "use_ema=True reads averaged weights")
    model = tiny()
    load_checkpoint(model, content, use_ema=True)
    assert same(model, tiny(2))


def test_two_sets_of_weights_are_refused() -> None:
    expected = "expected one set of weights for the model, got several, under the prefixes "
    for state, prefixes in (
        (under("backbone.", dense(2)) | under("", dense(3)), "'backbone.', ''"),
        (under("backbone.", dense(2)) | under("model.backbone.", dense(3)), "'backbone.', 'model."),
        (under("encoder.", dense(2)) | under("net.", dense(3)), "'encoder.', 'net.'"),
    ):
        for strict in (False, True):
            refuses(dense(), state, expected + prefixes, strict=strict)
    # Single tensors too.
    a, b = (dense(seed).state_dict()["norm0.bias"] + seed for seed in (2, 3))
    refuses(dense(), {"norm0.bias": a, "model.norm0.bias": b}, expected, strict=False)


def test_two_state_dicts_are_refused() -> None:
    content = {"model": tiny(2).state_dict(), "state_dict": tiny(3).state_dict()}
    refuses(tiny(), content, "'model', 'state_dict'", "pass the one that is meant")
    model = tiny()
    load_checkpoint(model, {**content, "state_dict": tiny(2).state_dict()})  # the same twice
    assert same(model, tiny(2))
    # The name of the architecture, as timm's training script writes it.
    load_checkpoint(model, {"model": "rcvit_xs", "state_dict": tiny(3).state_dict()})
    assert same(model, tiny(3))


def test_two_sets_are_told_apart_with_a_reason() -> None:
    model = dense()
    state = under("backbone.", dense(2)) | under("net.", dense(2))
    report = load_checkpoint(model, state)
    assert same(model, dense(2))
    assert set(report.skipped.values()) == {"the same values as under 'backbone'"}

    model = dense()
    state = under("net.", dense(3, config=OTHER)) | under("model.", dense(2))
    report = load_checkpoint(model, state)
    assert same(model, dense(2))
    (why,) = set(report.skipped.values())
    assert why.startswith(
        "these are of an RCViT with layers (2, 1, 2, 1) and dims (8, 12, 24, 20), "
    )

    # A head of somebody else beside a whole backbone.
    model = dense()
    heads = {"head.weight": torch.ones(5, 20), "norm0.bias": torch.ones(8)}
    report = load_checkpoint(model, under("backbone.", dense(2)) | heads, strict=False)
    assert same(model, dense(2))
    assert report.unexpected == ("norm0.bias",)


def test_an_unknown_prefix_is_named() -> None:
    message = refuses(dense(), under("student.", dense(2)), "another architecture")
    assert "behind the prefix 'student.'" in message


def test_a_module_that_has_the_prefix_itself() -> None:
    whole, other = nn.Module(), nn.Module()
    for module, seed in ((whole, 1), (other, 2)):
        module.backbone = dense(seed)
        module.neck = nn.Linear(2, 2)
    report = load_checkpoint(whole, {"state_dict": other.state_dict()})
    assert same(whole, other)
    assert report.skipped == {}


@pytest.mark.parametrize("stages", [(0,), (1, 2), (0, 2), (-1,)])
def test_a_backbone_of_some_stages_takes_the_whole(stages: tuple[int, ...]) -> None:
    for source in (dense(2), tiny(2)):
        model = dense(out_indices=stages)
        report = load_checkpoint(model, {"state_dict": under("backbone.", source)})
        assert report.unexpected == ()
        own, theirs = model.state_dict(), source.state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in own if key in theirs)
        assert report.loaded == sum(key in theirs for key in own)
    refuses(dense(), dense(2, out_indices=(0, 1)).state_dict(), "lacks")
    refuses(rcvit_xs(fork_feat=True, out_indices=(1,)), rcvit_s().state_dict(), "an rcvit_s file")


def test_birders_weights_are_named() -> None:
    birders = {
        "stem.0.weight": torch.ones(4, 3, 3, 3),
        "body.stage1.blocks.0.attn.op_q.0.block.0.weight": torch.ones(8, 1, 3, 3),
        "classifier.weight": torch.ones(5, 20),
    }
    for content in (birders, {"state": birders, "task": "image_classification"}):
        for strict in (False, True):
            refuses(tiny(), content, "birder's cas_vit", "op_q and op_k", strict=strict)
    renamed = {k.replace("oper_", "op_"): t for k, t in tiny(2).state_dict().items()}
    refuses(tiny(), renamed, "birder", strict=False)


def save_safetensors(state: State, path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.SAFETENSORS", "model.bin"])
def test_safetensors(tmp_path: Path, name: str) -> None:
    save_safetensors(under("backbone.", dense(2)) | parts("neck"), tmp_path / name)
    model = dense()
    report = load_checkpoint(model, tmp_path / name)
    assert same(model, dense(2))
    assert len(report.skipped) == 3
    torch.save(dense(3).state_dict(), tmp_path / name)  # whatever it is called
    load_checkpoint(model, tmp_path / name)
    assert same(model, dense(3))


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(tiny(2).state_dict(), path)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:20],
        whole[:3],
        b"\xff" * 8 + whole[8:],  # a header larger than memory
        whole[:8] + b"[" + whole[9:],
        whole[:8] + b"{" * length + whole[8 + length :],
        whole[:8] + whole[8:].replace(b'"F32"', b'"F99"'),
        whole[:8] + whole[8:].replace(b'"shape":[8]', b'"shape":[9]'),
    ):
        path.write_bytes(damaged)
        refuses(tiny(), path, str(path), "written by safetensors, got")
    path.write_bytes(b"")
    refuses(tiny(), path, "an empty file")


def test_safetensors_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(tiny(2).state_dict(), path)
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtra, match=r"safetensors.*pip install .*\[safetensors\]"):
        load_checkpoint(tiny(), path)
