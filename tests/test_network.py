"""`fuse_network`: results, which calls kernels serve, and what everything else gives."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from networks import Elsewhere, assert_right, flat, tiny, trained
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from casvit_kernels import (
    BackendUnavailable,
    FusedNetwork,
    fold_for_inference,
    fuse,
    fuse_network,
    unfuse,
    use_backend,
)
from casvit_kernels.models import Config
from casvit_kernels.ops.network import cpu, dispatch

MEAN, STD = (0.48, 0.45, 0.4), (0.22, 0.23, 0.26)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape) + 0.2


def call(net: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 3, 64, 48)),
        ({"distillation": False}, (1, 3, 33, 70)),
        ({"num_classes": 0}, (3, 3, 61, 32)),
        ({"fork_feat": True}, (2, 3, 45, 83)),
        ({"fork_feat": True, "out_indices": (0, 2)}, (1, 3, 32, 32)),
        ({"in_chans": 1, "num_classes": 1}, (2, 1, 35, 37)),
        ({"in_chans": 5, "drop_rate": 0.1, "drop_path_rate": 0.2}, (1, 5, 96, 40)),
    ],
)
@pytest.mark.parametrize("changed", ["plain", "fused", "folded"])
def test_results(served, options: dict[str, Any], shape: tuple[int, ...], changed: str) -> None:
    model = tiny(**options)
    if changed == "fused":
        fuse(model)
    net = fuse_network(fold_for_inference(model) if changed == "folded" else model)
    x = images(*shape)
    assert_right(net, model, x)
    assert_right(net, model, x.contiguous(memory_format=torch.channels_last))
    assert served.calls == 2


@pytest.mark.parametrize("dims", [(2, 3, 5, 7), (24, 56, 33, 65)])
def test_channels_that_fill_no_vector(served, dims: tuple[int, int, int, int]) -> None:
    model = tiny(Config((1, 2, 1, 1), dims))
    assert_right(fuse_network(model), model, images(2, 3, 50, 66))
    assert served.calls == 1


def test_other_depths(served) -> None:
    for layers in ((0, 1, 0, 1), (1, 3, 1, 2)):
        model = tiny(Config(layers, (4, 6, 8, 8)), fork_feat=True)
        assert_right(fuse_network(model), model, images(1, 3, 64, 64))
    assert served.calls == 2


def test_a_pruned_model_and_an_unpooled_one(served) -> None:
    pruned = tiny()
    pruned.prune_intermediate_layers((1,))
    unpooled = tiny()
    unpooled.reset_classifier(0, "")
    for model in (pruned, unpooled):
        out = assert_right(fuse_network(model), model, images(2, 3, 64, 50))
        assert out.dim() == 4
    assert served.calls == 2


def test_somebody_elses_network(served) -> None:
    model = trained(Elsewhere())
    assert_right(fuse_network(model), model, images(2, 4, 70, 41))
    assert served.calls == 1


def test_birders_network(served) -> None:
    pytest.importorskip("birder")
    from birder.model_registry import registry

    model = trained(registry.net_factory("cas_vit_xs", 10, input_channels=3))
    assert_right(fuse_network(model), model, images(1, 3, 64, 64))
    model.reset_classifier(0)
    assert_right(fuse_network(model), model, images(1, 3, 64, 64))
    assert served.calls == 2


@pytest.mark.parametrize("height", [40, 57])
def test_normalised_images(served, height: int) -> None:
    """What torchvision's Normalize and the model give; padding is of normalised pixels."""
    from torchvision.transforms import Normalize

    model = tiny()
    net = fuse_network(model, normalize=(MEAN, STD))
    pixels = torch.randint(0, 256, (2, 3, height, 43), dtype=torch.uint8)
    share = pixels.double() / 255
    wide = Normalize(MEAN, STD)(share)
    assert_right(net, model, pixels, wide)
    assert_right(net, model, pixels.contiguous(memory_format=torch.channels_last), wide)
    assert_right(net, model, share.float(), wide)
    assert served.calls == 3
    for x in (pixels, share.float(), share):  # the model, with gradients and in float64
        expected = model.double()(wide) if x.dtype == torch.float64 else model(wide.float())
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert served.calls == 3


def test_strides_of_the_input(served) -> None:
    model = tiny()
    net = fuse_network(model)
    x = images(4, 6, 80, 70)
    for view in (x[::2, 1:4, 3:50, ::2], x[:, :3].transpose(2, 3), x[:1, :1].expand(2, 3, 80, 70)):
        assert_right(net, model, view)
    assert served.calls == 3


def test_layout_of_maps(served) -> None:
    model = tiny(fork_feat=True)
    net = fuse_network(model)
    x = images(2, 3, 64, 64)
    assert all(t.is_contiguous() for t in call(net, x))
    maps = call(net, x.to(memory_format=torch.channels_last))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in maps)
    assert served.calls == 2


@pytest.mark.parametrize("shape", [(32, 16385), (16385, 32)])
def test_images_longer_than_kernels_take(served, shape: tuple[int, int]) -> None:
    model = tiny(Config((0, 0, 0, 0), (4, 4, 4, 4)))
    net = fuse_network(model)
    x = images(1, 3, *shape)
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
    assert served.calls == 0


def test_without_images(served) -> None:
    for options in ({}, {"fork_feat": True}, {"num_classes": 0}):
        model = tiny(**options)
        x = torch.empty(0, 3, 47, 64)
        got, expected = flat(call(fuse_network(model), x)), flat(call(model, x))
        assert [t.shape for t in got] == [t.shape for t in expected]


def test_the_same_again_and_results_of_their_own(served) -> None:
    net = fuse_network(tiny())
    x = images(2, 3, 64, 64)
    first = call(net, x)
    kept = first.clone()
    assert torch.equal(call(net, x), first)
    call(net, x + 1)
    assert torch.equal(first, kept)
    with torch.inference_mode():
        assert torch.equal(net(x), first)


# Who computes ------------------------------------------------------------------------------------


@pytest.fixture
def pair(served) -> tuple[nn.Module, FusedNetwork]:
    model = tiny()
    return model, fuse_network(model)


def test_gradients_are_the_models(served, pair) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    net(x).square().sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    model(x).square().sum().backward()
    assert all(map(torch.equal, got, (p.grad for p in model.parameters())))
    assert served.calls == 0


def test_frozen_parameters_are_served_with_gradients_on(served, pair) -> None:
    model, net = pair
    model.requires_grad_(False)
    x = images(2, 3, 64, 64)
    assert not net(x).requires_grad
    assert served.calls == 1
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(leaf).sum(), leaf)
    assert grad.abs().max() > 0
    model.head.weight.requires_grad_()
    assert net(x).requires_grad
    assert served.calls == 1


def test_training_is_the_models(served, pair) -> None:
    model, net = pair
    assert net.train() is net
    assert model.training
    assert net.training
    before = model.norm.running_mean.clone()
    logits, distilled = call(net, images(4, 3, 64, 64))
    assert not torch.equal(logits, distilled)
    assert not torch.equal(model.norm.running_mean, before)
    net.eval()
    model.norm.train()  # one norm alone
    before = model.norm.running_mean.clone()
    call(net, images(4, 3, 64, 64))
    assert not torch.equal(model.norm.running_mean, before)
    assert served.calls == 0
    model.eval()
    call(net, images(4, 3, 64, 64))
    assert served.calls == 1


def test_training_takes_small_images_as_before(served, pair) -> None:
    _, net = pair
    call(net.train(), images(4, 3, 24, 24))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_the_models(served, pair, dtype: torch.dtype) -> None:
    model, net = pair
    assert net.to(dtype) is net
    x = images(2, 3, 64, 64).to(dtype)
    assert torch.equal(call(net, x), call(model, x))
    assert served.calls == 0
    net.float()
    assert_right(net, model, x.float())
    assert served.calls == 1


def test_a_dtype_that_does_not_fit(served) -> None:
    """The model says so itself; and once it fits again, kernels serve."""
    model = fold_for_inference(
        tiny()
    )  # parameters alone, which stay the same objects when they move
    net = fuse_network(model)
    x = images(2, 3, 64, 64)
    net.double()
    with pytest.raises(RuntimeError) as theirs:
        call(model, x)
    with pytest.raises(RuntimeError) as mine:
        call(net, x)
    assert str(mine.value) == str(theirs.value)
    net.float()
    assert_right(net, model, x)
    assert served.calls == 1


def test_autocast_transforms_and_counters_are_the_models(served, pair) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    with torch.autocast("cpu"):
        out = call(net, x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, call(model, x))
    with torch.no_grad():
        assert torch.equal(torch.vmap(net)(x[None])[0], torch.vmap(model)(x[None])[0])
        with FlopCounterMode(display=False) as mine:
            net(x)
        with FlopCounterMode(display=False) as theirs:
            model(x)
    assert mine.get_total_flops() == theirs.get_total_flops() > 0
    tangent = torch.func.jvp(net, (x,), (x,))[1]
    assert torch.equal(tangent, torch.func.jvp(model, (x,), (x,))[1])
    assert served.calls == 0


def test_modes_see_the_models_operations(served, pair) -> None:
    _, net = pair
    seen: list[str] = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    class Subclass(Tensor):
        pass

    x = images(2, 3, 64, 64)
    with Dispatch():
        call(net, x)
    assert any("convolution" in name for name in seen)
    with Function():
        call(net, x)
    assert "conv2d" in seen
    assert type(call(net, x.as_subclass(Subclass))) is Subclass
    assert served.calls == 0


def test_other_parameters_for_one_call(served, pair) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    others = {name: p.detach() * 1.1 for name, p in net.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(model, others, (x,))
        got = torch.func.functional_call(net, others, (x,))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, assert_right(net, model, x), rtol=1e-2)


def test_backends(served, pair, monkeypatch) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    with use_backend("reference"):
        assert torch.equal(call(net, x), call(model, x))
    assert served.calls == 0
    with use_backend("cpu"):
        call(net, x)
    assert served.calls == 1
    with use_backend("triton"), pytest.raises(BackendUnavailable, match=r"whole network.*cpu, ref"):
        call(net, x)
    monkeypatch.setenv("CASVIT_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        call(net, x)


def test_without_the_native_library(served, pair, monkeypatch) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    monkeypatch.setattr(dispatch, "_instead", None)
    monkeypatch.setattr(cpu, "kernels", lambda: None)
    assert torch.equal(call(net, x), call(model, x))
    assert torch.equal(call(fuse_network(model), x), call(model, x))


def test_hooks_run(served, pair) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    seen: list[str] = []
    own = net.register_forward_hook(lambda *_: seen.append("own"))
    call(net, x)
    assert (seen, served.calls) == (["own"], 1)
    call(model, x)
    assert seen == ["own"]
    for module in (model, model.network[2], model.network[0][0].mlp.act):
        hook = module.register_forward_hook(lambda *_: seen.append("inside"))
        with pytest.warns(UserWarning, match="has hooks"):
            assert torch.equal(call(net, x), call(model, x))
        assert seen[-3:] == ["inside", "own", "inside"]
        assert served.calls == 1
        hook.remove()
    own.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("all"))
    try:
        call(net, x)
    finally:
        everywhere.remove()
    assert seen.count("all") > 50
    assert served.calls == 1
    call(net, x)
    assert served.calls == 2


# What it shares with the model -------------------------------------------------------------------


def test_it_stands_for_the_model(served, pair) -> None:
    model, net = pair
    assert list(net.state_dict()) == list(model.state_dict())
    assert dict(net.named_parameters()) == dict(model.named_parameters())
    assert dict(net.named_buffers()) == dict(model.named_buffers())
    assert [n for n, _ in net.named_modules()] == [n for n, _ in model.named_modules()]
    assert all(map(lambda a, b: a is b, net.parameters(), model.parameters()))
    assert net.num_classes == 5
    assert "num_classes" in dir(net)
    x = images(2, 3, 64, 64)
    assert torch.equal(net.forward_features(x), model.forward_features(x))
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = net.nothing_of_this_name
    text = repr(net)
    assert "RCViT in one call on the CPU, precision='fp32'" in text
    assert "patch_embed" in text
    assert "std" not in text
    assert "0.22" in repr(fuse_network(model, normalize=(MEAN, STD)))


def test_the_original(served, pair) -> None:
    model, net = pair
    assert unfuse(net) is model
    assert net.original() is model
    larger = nn.Sequential(net, nn.Softmax(1))
    report = unfuse(larger)
    assert report.restored == ("0",)
    assert larger[0] is model
    larger = nn.Sequential(fuse_network(model, normalize=(MEAN, STD)))
    report = unfuse(larger)
    assert report.restored == ()
    assert "normalises" in report.kept[0].reason
    again = fuse_network(net)
    assert again.original() is model


def test_in_a_larger_model(served, pair) -> None:
    model, net = pair
    larger = nn.Sequential(net, nn.Softmax(1))
    x = images(2, 3, 64, 64)
    state = copy.deepcopy(larger.state_dict())
    assert "0.network.0.0.mlp.fc1.weight" in state
    with torch.no_grad():
        model.head.bias.zero_()
    changed = call(larger, x)
    larger.load_state_dict(state)
    assert not torch.equal(call(larger, x), changed)
    torch.testing.assert_close(call(larger, x), call(model, x).softmax(1))
    assert served.calls == 3
    larger.train()
    assert model.network[0].training
    larger.eval().double()
    assert model.head.weight.dtype == torch.float64


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "save"])
def test_copies(served, pair, how: str, tmp_path) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    expected = call(net, x)
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "copy":
        other = copy.copy(net)
    elif how == "pickle":
        data = pickle.dumps(net)
        weights = sum(t.nbytes for t in net.state_dict().values())
        assert len(data) < 2.5 * weights + 200_000  # neither packed weights nor scratch memory
        other = pickle.loads(data)
    else:
        torch.save(net, tmp_path / "net.pt")
        other = torch.load(tmp_path / "net.pt", weights_only=False)
    assert other.memory == (0, 0)
    assert torch.equal(call(other, x), expected)
    assert served.calls == 2
    assert (other.original() is model) == (how == "copy")
    with torch.no_grad():
        model.head.bias.add_(1)
    assert torch.equal(call(other, x), call(net, x)) == (how == "copy")


def test_attributes_go_to_the_model(served, pair) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    both = call(net, x)
    net.distillation = False
    assert model.distillation is False
    assert not torch.equal(assert_right(net, model, x), both)
    net.head = nn.Linear(20, 9)
    assert model.head.out_features == 9
    assert assert_right(net, model, x).shape == (2, 9)
    net.mark = 1
    del net.mark
    assert not hasattr(model, "mark")


def test_surgery_goes_on(served, pair) -> None:
    model, net = pair
    x = images(2, 3, 64, 64)
    assert len(fuse(net).swapped) == 5
    assert_right(net, model, x)
    folded = fold_for_inference(net)
    assert_right(folded, model, x)
    assert isinstance(folded, FusedNetwork)
    assert served.calls == 2


def test_memory(served, pair) -> None:
    _, net = pair
    assert net.memory == (0, 0)
    call(net, images(1, 3, 32, 32))
    small = net.memory
    weights = sum(p.nbytes for p in net.parameters())
    assert small.packed > weights / 2
    assert small.scratch > 0
    call(net, images(1, 3, 96, 96))
    large = net.memory
    assert large.scratch > small.scratch
    call(net, images(1, 3, 32, 32))
    assert net.memory == large


def test_several_threads(served, pair) -> None:
    _, net = pair
    inputs = [images(b, 3, 32 + 8 * b, 40) for b in range(1, 5)]
    expected = [call(net, x) for x in inputs]
    wrong: list[int] = []

    def serve(index: int) -> None:
        for turn in range(10):
            if index == 0 and turn == 5:
                net.refresh()
            if not torch.equal(call(net, inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert served.calls == 44


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1.0], TypeError, "x: expected a torch.Tensor, got list"),
        (
            torch.ones(3, 64, 64),
            ValueError,
            r"4 dimensions \(B, C, H, W\), got shape \(3, 64, 64\)",
        ),
        (torch.ones(1, 4, 64, 64), ValueError, "expected 3 channels .* got 4 in shape"),
        (torch.ones(1, 3, 31, 64), ValueError, "expected H >= 32 and W >= 32, got 31x64"),
        (torch.ones(1, 3, 64, 8), ValueError, "expected H >= 32 and W >= 32, got 64x8"),
        (torch.ones(1, 3, 64, 64).int(), TypeError, "expected a floating dtype, got torch.int32$"),
        (
            torch.ones(1, 3, 64, 64).byte(),
            TypeError,
            r"got torch.uint8 \(.*normalize=\(mean, std\)",
        ),
    ],
)
def test_bad_images(served, pair, x: Any, error: type[Exception], text: str) -> None:
    model, net = pair
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(error, match=text) as caught:
            net(x)
    if "32" not in text or "int32" in text:  # as the model itself says it
        with pytest.raises(error) as theirs:
            model(x)
        assert str(caught.value).startswith(str(theirs.value))
    normalised = fuse_network(model, normalize=(MEAN, STD))
    with pytest.raises(TypeError, match=r"a floating dtype or uint8, got torch\.int32"):
        normalised(torch.ones(1, 3, 64, 64).int())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"precision": "fp16"}, ValueError, "precision: expected 'fp32' or 'bf16', got 'fp16'"),
        ({"precision": 0}, ValueError, "precision: .* got 0"),
        ({"example_input": 3}, TypeError, "example_input: .* got int"),
        ({"example_input": torch.ones(2, dtype=torch.int)}, TypeError, "example_input: .*int32"),
        ({"example_input": torch.ones(3, 64, 64)}, ValueError, r"example_input: .*\(3, 64, 64\)"),
        ({"normalize": 0.5}, TypeError, "normalize: expected two sequences"),
        ({"normalize": (0.5, 0.5)}, TypeError, "normalize: expected two sequences"),
        ({"normalize": (MEAN, STD, STD)}, TypeError, "normalize: expected two sequences"),
        ({"normalize": (MEAN, STD[:2])}, ValueError, "normalize: .* got 3 and 2"),
        ({"normalize": (MEAN[:2], STD[:2])}, ValueError, "normalize: expected 3 means .* got 2"),
        ({"normalize": (MEAN, (1, 1, 0))}, ValueError, "normalize: .* deviations above 0"),
        ({"normalize": (MEAN, (1, 1, float("nan")))}, ValueError, "normalize: expected finite"),
        ({"normalize": ((123.7, 116, 104), STD)}, ValueError, "normalize: .* divide"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fuse_network(tiny(), **arguments)


def test_no_module_and_training() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        fuse_network(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in training: call model.eval\(\) first"):
        fuse_network(tiny().train())
    model = tiny()
    model.network[0][0].norm1.train()
    with pytest.raises(ValueError, match=r"network\.0\.0\.norm1"):
        fuse_network(model)


def test_bf16_without_instructions(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "has_precision", lambda precision: precision == "fp32")
    monkeypatch.setattr(dispatch, "instruction_sets", lambda: {"amx": "no", "avx2": None})
    monkeypatch.setattr(dispatch, "active_instruction_set", lambda: "avx2")
    with pytest.raises(
        BackendUnavailable, match=r"amx or avx512_bf16; .* have avx2, in use is avx2"
    ):
        fuse_network(tiny(), precision="bf16")


def test_bf16_unpickled_without_instructions(served, pair, monkeypatch) -> None:
    _, net = pair
    vars(net)["_precision"] = "bf16"
    loaded = pickle.loads(pickle.dumps(net))
    monkeypatch.setattr(cpu, "has_precision", lambda precision: precision == "fp32")
    with pytest.raises(BackendUnavailable, match=r"precision: expected 'fp32', got 'bf16'"):
        call(loaded, images(2, 3, 40, 48))
