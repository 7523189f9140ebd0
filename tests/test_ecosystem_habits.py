"""What people put around models: accelerate, Lightning, Trainer, torchao, PEFT, FSDP2, torch.compile.

Each with fused mixers, held against the plain model. docs/dense_prediction.md has a line for each.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchvision")

from casvit_kernels import FusedCATM, UnfusedWarning, fuse
from casvit_kernels.models import Config, RCViT
from casvit_kernels.models.heads import mask_rcnn, retinanet, semantic_fpn

TINY = Config((1, 1, 1, 1), (8, 12, 16, 16))


def segmenter(**options: Any) -> Any:
    torch.manual_seed(0)
    return semantic_fpn(TINY, 3, channels=8, pyramid_channels=8, dropout=0.0, **options)


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 32, 32, generator=generator)
    return x, torch.randint(0, 3, (2, 32, 32), generator=generator)


def plain_steps(model: nn.Module, count: int = 2) -> list[float]:
    """Losses of steps by hand, with SGD at 0.1."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(count):
        x, labels = batch()
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def expected() -> list[float]:
    return plain_steps(segmenter().train())


def test_accelerate_trains_as_by_hand(expected: list[float]) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = segmenter(fused=True).train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    losses = []
    for _ in range(2):
        x, labels = batch()
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-3)
    assert accelerator.get_state_dict(model).keys() == segmenter().state_dict().keys()


def test_lightning_trains_as_by_hand_and_leaves_norms_frozen(
    expected: list[float], tmp_path: Any
) -> None:
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    losses: list[float] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = segmenter(fused=True)

        def training_step(self, pair: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self.model(pair[0]), pair[1])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    before = {name: b.clone() for name, b in module.model.backbone.body.named_buffers()}
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are few workers
        trainer.fit(module, torch.utils.data.DataLoader([batch()] * 2, batch_size=None))
    assert losses == pytest.approx(expected, rel=1e-3)
    after = dict(module.model.backbone.body.named_buffers())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


class WithLoss(nn.Module):
    """What transformers' Trainer expects: labels in, the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.model = segmenter(fused=True)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.model(pixel_values)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


def test_transformers_trainer_trains_as_by_hand(expected: list[float], tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    x, labels = batch()
    rows = [{"pixel_values": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model=WithLoss(), args=arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx(expected, rel=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    assert any((tmp_path / "saved").iterdir())


def test_torchao_quantizes_what_is_linear_and_leaves_mixers_fused() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = mask_rcnn(
        TINY, 3, channels=16, fc_channels=64, fused=True, min_size=64, max_size=64
    ).eval()
    before = copy.deepcopy(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    quantized = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and type(m.weight.data) is not Tensor
    ]
    assert quantized == [
        *("roi_heads.box_head.fc6", "roi_heads.box_head.fc7"),
        *("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"),
    ]
    x = torch.rand(5, 16, 7, 7)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UnfusedWarning)
        one, other = (m.roi_heads.box_head(x) for m in (model, before))
        assert 0 < (one - other).norm() < 0.02 * other.norm()
        (found,) = model([torch.rand(3, 64, 64)])
    assert found.keys() == {"boxes", "labels", "scores", "masks"}


def test_lora_beside_the_mixers_leaves_them_fused_and_inside_is_followed() -> None:
    peft = pytest.importorskip("peft")
    x, labels = batch()
    for targets, warned in ((["fc1", "fc2"], False), (["qkv"], True)):
        base = segmenter(fused=True).eval()
        reference = base(x).detach()
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(base), config).train()
        unfused = [
            w
            for w in recorded(lambda m=model: F.cross_entropy(m(x), labels).backward())
            if issubclass(w.category, UnfusedWarning)
        ]
        assert bool(unfused) == warned
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained
        assert all("lora_" in name for name in trained)
        # As a plain model with the same adapters computes it, and merged it is fused again.
        plain = peft.get_peft_model(segmenter(), config).eval()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfusedWarning)
            adapted = model.eval()(x)
            assert not torch.allclose(adapted, reference, atol=1e-4)
            torch.testing.assert_close(adapted, plain(x), rtol=1e-3, atol=1e-4)
            merged = model.merge_and_unload()
            assert not recorded(lambda m=merged: m(x))
            torch.testing.assert_close(merged(x), adapted, rtol=1e-3, atol=1e-4)


def recorded(call: Any) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_fsdp2_trains_as_by_hand(expected: list[float]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = segmenter(fused=True).train()
    mesh = init_device_mesh("cpu", (1,))
    for stage in model.backbone.body.network:
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert plain_steps(model) == pytest.approx(expected, rel=1e-3)
    assert sum(isinstance(m, FusedCATM) for m in model.modules()) == 4


@pytest.mark.long
def test_compile_around_a_detector() -> None:
    torch.manual_seed(0)
    plain = retinanet(TINY, 3, channels=8, min_size=64, max_size=64, score_thresh=0.0).eval()
    fused = copy.deepcopy(plain)
    fuse(fused)
    fused.backbone.compile(backend="aot_eager", fullgraph=True)
    x = [torch.rand(3, 64, 64), torch.rand(3, 64, 48)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([2])}] * 2
    with torch.no_grad():
        for a, b in zip(fused(x), plain(x), strict=True):
            torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-3, atol=1e-4)
    losses = []
    for model in fused.train(), plain.train():
        total = sum(model(x, targets).values())
        total.backward()
        losses.append(total.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert fused.backbone.body.patch_embed[0].weight.grad is not None


@pytest.mark.long  # takes a minute to trace
def test_compile_around_all_of_a_detector() -> None:
    torch.manual_seed(0)
    model = retinanet(TINY, 3, channels=8, min_size=64, max_size=64, fused=True).eval()
    model.score_thresh = 0.0
    x = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        (expected,) = model(x)
        (found,) = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-4)


def test_a_classifier_is_quantized_and_adapted_alike() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = RCViT(TINY, num_classes=64, fused=True, distillation=False).eval()
    x = batch()[0]
    with torch.no_grad():
        before = model(x)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        assert (model(x) - before).norm() < 0.02 * before.norm()
