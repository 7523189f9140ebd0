"""The RCViT family: keys, initial weights, outputs, arguments, and its place in timm.

The recorded numbers and digests were read from the published implementation.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import casvit_kernels
from casvit_kernels import AdditiveTokenMixer, FusedCATM
from casvit_kernels.models import CONFIGS, Config, RCViT, rcvit_m, rcvit_s, rcvit_t, rcvit_xs
from casvit_kernels.models.rcvit import DropPath

SIZES = {"rcvit_xs": rcvit_xs, "rcvit_s": rcvit_s, "rcvit_m": rcvit_m, "rcvit_t": rcvit_t}
TINY = Config((1, 1, 2, 1), (8, 12, 16, 20))


def expected_state(
    config: Config, in_chans: int = 3, classes: int = 1000, fork_feat: bool = False
) -> list[tuple[str, tuple[int, ...]]]:
    """Every key of the published network with its shape, in order."""
    state: list[tuple[str, tuple[int, ...]]] = []

    def conv(name: str, out: int, inner: int, size: int, bias: bool = True) -> None:
        state.append((f"{name}.weight", (out, inner, size, size)))
        if bias:
            state.append((f"{name}.bias", (out,)))

    def norm(name: str, dim: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            state.append((f"{name}.{part}", (dim,)))
        state.append((f"{name}.num_batches_tracked", ()))

    def block(name: str, dim: int) -> None:
        conv(f"{name}.local_perception.network.0", dim, dim, 1)
        norm(f"{name}.local_perception.network.1", dim)
        conv(f"{name}.local_perception.network.2", dim, 1, 3)
        conv(f"{name}.local_perception.network.4", dim, dim, 1)
        norm(f"{name}.norm1", dim)
        conv(f"{name}.attn.qkv", 3 * dim, dim, 1, bias=False)
        for gate in ("oper_q", "oper_k"):
            conv(f"{name}.attn.{gate}.0.block.0", dim, 1, 3)
            norm(f"{name}.attn.{gate}.0.block.1", dim)
            conv(f"{name}.attn.{gate}.0.block.3", 1, dim, 1, bias=False)
            conv(f"{name}.attn.{gate}.1.block.1", dim, dim, 1, bias=False)
        conv(f"{name}.attn.dwc", dim, 1, 3)
        conv(f"{name}.attn.proj", dim, 1, 3)
        norm(f"{name}.norm2", dim)
        conv(f"{name}.mlp.fc1", 4 * dim, dim, 1)
        conv(f"{name}.mlp.fc2", dim, 4 * dim, 1)

    layers, dims = config
    conv("patch_embed.0", dims[0] // 2, in_chans, 3)
    norm("patch_embed.1", dims[0] // 2)
    conv("patch_embed.3", dims[0], dims[0] // 2, 3)
    norm("patch_embed.4", dims[0])
    for stage in range(4):
        if stage > 0:
            conv(f"network.{2 * stage - 1}.proj", dims[stage], dims[stage - 1], 3)
            norm(f"network.{2 * stage - 1}.norm", dims[stage])
        for index in range(layers[stage]):
            block(f"network.{2 * stage}.{index}", dims[stage])
    if fork_feat:
        for stage in range(4):
            norm(f"norm{2 * stage}", dims[stage])
    else:
        norm("norm", dims[3])
        for head in ("head", "dist_head"):
            state += [(f"{head}.weight", (classes, dims[3])), (f"{head}.bias", (classes,))]
    return state


def state_of(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()]


def digest(state: list[tuple[str, tuple[int, ...]]]) -> str:
    text = "\n".join(f"{key} {shape}" for key, shape in state)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("name", "parameters", "published", "published_fork_feat"),
    [
        ("rcvit_xs", 3_200_700, "6000dc92ff66319f", "8719b85fdb3a945d"),
        ("rcvit_s", 5_764_224, "89872b785158578f", "50c5a0572da00ee7"),
        ("rcvit_m", 12_421_520, "dd47dbd691b67c66", "e4aacbf62aba8714"),
        ("rcvit_t", 21_763_120, "a54909c73f9005b5", "0191118070c14df7"),
    ],
)
def test_keys_shapes_and_order_are_the_published_ones(
    name: str, parameters: int, published: str, published_fork_feat: str, fused: bool
) -> None:
    model = SIZES[name](fused=fused)
    assert state_of(model) == expected_state(CONFIGS[name])
    assert digest(state_of(model)) == published
    assert sum(p.numel() for p in model.parameters()) == parameters
    dense = SIZES[name](fused=fused, fork_feat=True)
    assert state_of(dense) == expected_state(CONFIGS[name], fork_feat=True)
    assert digest(state_of(dense)) == published_fork_feat


def test_keys_without_heads_and_with_other_channels() -> None:
    keys = [key for key, _ in expected_state(TINY)]
    assert list(RCViT(TINY, distillation=False).state_dict()) == keys[:-2]
    assert list(RCViT(TINY, num_classes=0).state_dict()) == keys[:-4]
    model = RCViT(TINY, num_classes=7, in_chans=5)
    assert state_of(model) == expected_state(TINY, in_chans=5, classes=7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_seed_gives_the_published_weights_and_outputs(fused: bool) -> None:
    torch.manual_seed(0)
    model = rcvit_xs(fused=fused)
    total = sum(p.detach().double().abs().sum() for p in model.parameters())
    assert float(total) == pytest.approx(111545.28588806702, rel=1e-6)
    assert model.head.weight[0, :3].tolist() == pytest.approx(
        [-0.005890548694878817, -0.007563695777207613, -0.03637923300266266], rel=1e-5
    )
    assert model.dist_head.weight[-1, -3:].tolist() == pytest.approx(
        [-0.004502460360527039, 0.011261142790317535, 0.0036813649348914623], rel=1e-5
    )

    model = model.double()
    x = photograph()
    with torch.no_grad():
        logits = model.eval()(x)
    assert logits[0, :3].tolist() == pytest.approx(
        [0.09747720577597432, -0.10299372233268922, -0.12363492291093858], rel=1e-5
    )
    head, dist_head = model.train()(x)
    assert head[0, :3].tolist() == pytest.approx(
        [0.07050352709571778, 0.14773480717396464, -0.13082643141214012], rel=1e-5
    )
    assert dist_head[1, -3:].tolist() == pytest.approx(
        [-0.06376379446623631, 0.02790734706268011, -0.06407060860111381], rel=1e-5
    )
    (head.square().sum() + dist_head.sum()).backward()
    gate = model.get_submodule("network.4.2.attn.oper_k.0.block.0")
    assert float(gate.weight.grad.abs().sum()) == pytest.approx(1.971547798436796, rel=1e-4)
    stem = model.get_submodule("patch_embed.0")
    assert float(stem.weight.grad.abs().sum()) == pytest.approx(1981.4683612266376, rel=1e-4)
    norm = model.get_submodule("network.6.1.attn.oper_q.0.block.1")
    assert float(norm.running_var.sum()) == pytest.approx(199.2100004528334, rel=1e-6)
    with torch.no_grad():
        logits = model.eval()(x)
    assert logits[0, :3].tolist() == pytest.approx(
        [0.08568050605144475, -0.08852071018736458, -0.11368986591827432], rel=1e-5
    )


def test_a_seed_gives_the_published_stage_outputs() -> None:
    torch.manual_seed(0)
    model = rcvit_xs(fork_feat=True).double().eval()
    with torch.no_grad():
        maps = model(photograph())
    assert [float(m.abs().mean()) for m in maps] == pytest.approx(
        [0.28606261739775296, 0.3177198543974168, 0.4365416067572783, 0.3262470750862912], rel=1e-5
    )


def photograph() -> torch.Tensor:
    """Something that no layer maps to a constant; no random numbers."""
    ramp = torch.linspace(-2, 2, 2 * 3 * 40 * 56, dtype=torch.float64)
    return ramp.sin().mul(7).cos().reshape(2, 3, 40, 56)


def test_training_returns_the_pair_and_eval_its_average() -> None:
    model = RCViT(TINY, num_classes=5)
    x = torch.randn(2, 3, 33, 47)
    pair = model.train()(x)
    assert isinstance(pair, tuple)
    assert [tuple(y.shape) for y in pair] == [(2, 5), (2, 5)]
    with torch.no_grad():
        pooled = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        average = (model.head(pooled) + model.dist_head(pooled)) / 2
        torch.testing.assert_close(model(x), average)


@pytest.mark.parametrize("train", [False, True])
def test_one_head_without_distillation(train: bool) -> None:
    model = RCViT(TINY, num_classes=5, distillation=False).train(train)
    assert not hasattr(model, "dist_head")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("train", [False, True])
def test_no_classes_give_pooled_features(train: bool) -> None:
    model = RCViT(TINY, num_classes=0).train(train)
    x = torch.randn(2, 3, 64, 40)
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 20)
        if not train:
            torch.testing.assert_close(out, model.forward_features(x).mean((2, 3)))


def test_fork_feat_gives_four_normed_maps() -> None:
    model = RCViT(TINY, fork_feat=True)
    x = torch.randn(2, 3, 33, 70)
    maps = model.train()(x)
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 9, 18),
        (2, 12, 5, 9),
        (2, 16, 3, 5),
        (2, 20, 2, 3),
    ]
    for stage_map in maps:  # batch statistics make each channel's mean 0
        torch.testing.assert_close(
            stage_map.mean((0, 2, 3)), torch.zeros(stage_map.shape[1]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_and_plain_models_agree(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    plain = RCViT(TINY, num_classes=5).eval()
    fused = RCViT(TINY, num_classes=5, fused=True).eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 45, 61).to(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_fused_builds_fused_mixers_with_the_backend() -> None:
    fused = RCViT(TINY, fused=True, backend="reference", drop_rate=0.25)
    mixers = [m for name, m in fused.named_modules() if name.endswith(".attn")]
    assert len(mixers) == 5
    assert all(type(m) is FusedCATM and m.backend == "reference" for m in mixers)
    plain = [m for name, m in RCViT(TINY).named_modules() if name.endswith(".attn")]
    assert all(type(m) is AdditiveTokenMixer for m in plain)


def test_drop_rate_reaches_every_mixer_and_mlp() -> None:
    model = RCViT(TINY, drop_rate=0.25)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.25] * 10


def test_drop_path_grows_linearly_over_the_blocks() -> None:
    model = RCViT(TINY, drop_path_rate=0.4)
    blocks = [m for m in model.modules() if hasattr(m, "drop_path")]
    rates = [m.drop_path.rate if isinstance(m.drop_path, DropPath) else 0.0 for m in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_drops_whole_samples_and_scales_the_rest() -> None:
    torch.manual_seed(0)
    x = torch.rand(2000, 3, 2, 2) + 0.5
    y = DropPath(0.25).train()(x)
    kept = y[:, 0, 0, 0] != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert not y[~kept].any()
    assert 0.70 < float(kept.double().mean()) < 0.80  # 5 standard deviations
    assert DropPath(0.25).eval()(x) is x
    assert not DropPath(1.0).train()(x).any()


def test_drop_path_leaves_eval_alone() -> None:
    torch.manual_seed(0)
    model = RCViT(TINY).eval()
    dropping = RCViT(TINY, drop_path_rate=0.9, drop_rate=0.5).eval()
    dropping.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(dropping(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": -1}, r"num_classes: expected an integer >= 0, got -1"),
        ({"num_classes": 2.0}, r"num_classes: expected an integer >= 0, got 2.0"),
        ({"in_chans": 0}, r"in_chans: expected an integer >= 1, got 0"),
        ({"in_chans": -3}, r"in_chans: expected an integer >= 1, got -3"),
        ({"drop_path_rate": 1.1}, r"drop_path_rate: expected a probability in \[0, 1\], got 1.1"),
        ({"drop_path_rate": float("nan")}, r"drop_path_rate: .* got nan"),
        ({"drop_rate": -0.1}, r"drop_rate: expected a probability in \[0, 1\], got -0.1"),
        ({"drop_rate": "a"}, r"drop_rate: expected a probability in \[0, 1\], got 'a'"),
        ({"backend": "cpu"}, r"backend: expected None with fused=False .* got 'cpu'"),
        ({"backend": "gpu", "fused": True}, r"backend: expected one of .*reference.* got 'gpu'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rcvit_xs(**arguments)


def test_a_stem_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config\.dims\[0\]: expected an integer >= 2, got 1"):
        RCViT(Config((1, 1, 1, 1), (1, 4, 4, 4)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fork_feat", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(3, 32, 32),
            ValueError,
            r"x: expected 4 dimensions .* got shape \(3, 32, 32\)",
        ),
        (torch.zeros(1, 4, 32, 32), ValueError, r"x: expected 3 channels .* got 4"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, r"x: .*floating.* torch.uint8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.complex64), TypeError, r"x: .* torch.complex64"),
        ([[1.0]], TypeError, r"x: expected a torch.Tensor, got list"),
    ],
)
def test_bad_inputs_are_named(
    x: object, error: type[Exception], message: str, fork_feat: bool, fused: bool
) -> None:
    model = RCViT(TINY, fork_feat=fork_feat, fused=fused)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        model(x)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_the_head_can_be_replaced() -> None:
    model = RCViT(TINY, num_classes=5).double().eval()
    assert model.get_classifier() == (model.head, model.dist_head)
    model.reset_classifier(9)
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 9)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not model.head.bias.any()
    assert model.num_classes == 9
    model.reset_classifier(0, global_pool="avg")
    assert model.num_classes == 0
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 20)
    with pytest.raises(ValueError, match=r"num_classes: .* got -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match=r"global_pool: .* got 'max'"):
        model.reset_classifier(3, global_pool="max")
    dense = RCViT(TINY, fork_feat=True)
    for call in (dense.get_classifier, lambda: dense.reset_classifier(3)):
        with pytest.raises(RuntimeError, match="fork_feat=True"):
            call()


def test_a_dense_backbone_has_no_forward_head() -> None:
    model = RCViT(TINY, fork_feat=True).eval()
    with pytest.raises(RuntimeError, match=r"forward_head: .*fork_feat=True"):
        model.forward_head(model.forward_features(torch.randn(1, 3, 32, 32)))


def test_a_model_compiles_without_graph_breaks() -> None:
    model = RCViT(TINY, num_classes=5).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in (32, 40):
            x = torch.randn(1, 3, size, size)
            torch.testing.assert_close(compiled(x), model(x))


def run(code: str, *path: str) -> str:
    """Run code in a fresh interpreter, with `path` before the others; its standard output."""
    package = str(Path(casvit_kernels.__file__).parents[1])
    start = f"import sys; sys.path[:0] = {[*path, package]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_timm_builds_the_models() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "rcvit_xs", num_classes=7, in_chans=4, drop_path_rate=0.2, drop_rate=0.1, fused=True
    )
    assert state_of(model) == expected_state(CONFIGS["rcvit_xs"], in_chans=4, classes=7)
    assert [m.rate for m in model.modules() if isinstance(m, DropPath)][-1] == 0.2
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert type(model.get_submodule("network.0.0.attn")) is FusedCATM
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert timm.data.resolve_data_config(model=model)["crop_pct"] == 0.875
    assert set(timm.list_models("rcvit_*")) == set(CONFIGS)


def test_timm_takes_the_arguments_of_the_published_training_script() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "rcvit_s",
        pretrained=False,
        num_classes=7,
        drop_path_rate=0.1,
        layer_scale_init_value=1e-6,
        head_init_scale=1.0,
        input_res=224,
        classifier_dropout=0.0,
        distillation=False,
    )
    assert not hasattr(model, "dist_head")


def test_timm_features() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("rcvit_xs", features_only=True).eval()
    assert model.feature_info.channels() == [48, 56, 112, 220]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == model.feature_info.reduction()
    with pytest.raises(ValueError, match=r"out_indices: .* got \(1, 4\)"):
        timm.create_model("rcvit_xs", features_only=True, out_indices=(1, 4))


def test_timm_pretrained_says_that_no_weights_are_shipped() -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"pretrained: .*load_checkpoint"):
        timm.create_model("rcvit_xs", pretrained=True)
    with pytest.raises(TypeError, match="bogus"):
        timm.create_model("rcvit_xs", bogus=1)


def test_a_name_that_timm_already_knows_is_left_alone() -> None:
    pytest.importorskip("timm")
    out = run(
        """
        import warnings
        from timm.models import create_model, model_entrypoint, register_model
        @register_model
        def rcvit_xs(**kwargs):
            pass
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import casvit_kernels.models
        said = [str(w.message) for w in caught if "rcvit_xs" in str(w.message)]
        print(model_entrypoint("rcvit_xs") is rcvit_xs, len(said), said[0])
        print(type(create_model("rcvit_s")).__name__)
        """
    )
    assert out.startswith("True 1 timm knows a model rcvit_xs from __main__")
    assert out.endswith("RCViT")


def test_the_package_does_not_import_timm_and_works_without_it() -> None:
    out = run(
        """
        import casvit_kernels
        print("timm" in sys.modules)
        sys.modules["timm"] = None
        import casvit_kernels.models
        print(type(casvit_kernels.models.rcvit_xs()).__name__)
        """
    )
    assert out.split() == ["False", "RCViT"]


def test_a_broken_timm_does_not_cost_the_models(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise RuntimeError('no such operator')\n")
    out = run(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import casvit_kernels.models
        print(*[w.message for w in caught if "timm" in str(w.message)])
        """,
        str(tmp_path),
    )
    assert out.startswith("timm is installed but does not import")
    assert "no such operator" in out
