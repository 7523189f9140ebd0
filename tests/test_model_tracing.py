"""RCViT under torch.fx: symbolic tracing and torchvision's feature extractors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from casvit_kernels.models import Config, RCViT, rcvit_xs

TINY = Config((1, 1, 2, 1), (8, 12, 16, 20))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"distillation": False},
    {"num_classes": 0},
    {"fork_feat": True},
    {"drop_path_rate": 0.5, "drop_rate": 0.1},
]


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)  # dropped paths and values
    with torch.no_grad():
        return as_list(model(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_traced_model_computes_the_same(
    options: dict[str, Any], training: bool, fused: bool
) -> None:
    torch.manual_seed(0)
    model = RCViT(TINY, **{"num_classes": 5, "fused": fused, **options}).train(training)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    for size in (64, 40):  # a trace holds for other sizes
        x = torch.randn(3, 3, size, size)
        for ours, theirs in zip(run(model, x), run(traced, x), strict=True):
            assert torch.equal(ours, theirs)
    assert list(traced.state_dict()) == list(model.state_dict())


def test_a_trace_holds_layers_and_nothing_of_the_checks() -> None:
    graph = fx.symbolic_trace(RCViT(TINY).eval()).graph
    assert all("check" not in str(node.target) for node in graph.nodes)
    used = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    assert all(node.users for node in used)


@pytest.mark.parametrize("fused", [False, True])
def test_feature_extractor_of_torchvision(fused: bool) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = rcvit_xs(num_classes=5, fused=fused).eval()
    nodes = ["patch_embed", "network.0", "network.4.1", "norm", "head"]
    extractor = extraction.create_feature_extractor(model, nodes)
    x = torch.randn(1, 3, 64, 64)
    seen: dict[str, Tensor] = {}
    for name in nodes:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
    with torch.no_grad():
        model(x)
        found = extractor(x)
    assert list(found) == nodes
    for name in nodes:
        assert torch.equal(found[name], seen[name])


@pytest.mark.parametrize("fused", [False, True])
def test_feature_extractor_of_a_dense_backbone(fused: bool) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = RCViT(TINY, fork_feat=True, fused=fused).eval()
    extractor = extraction.create_feature_extractor(model, {"norm2": "fine", "norm6": "coarse"})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, maps = extractor(x), model(x)
    assert torch.equal(found["fine"], maps[1])
    assert torch.equal(found["coarse"], maps[3])
