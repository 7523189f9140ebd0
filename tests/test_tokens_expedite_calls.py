"""Calls of expedited models: compilers, gradients, positions, and what is refused with which words."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_tokens_expedite import WHOLE, hugging_face, made, timm_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from casvit_kernels.ops.tokens import reference
from casvit_kernels.tokens import cluster_tokens, expedite, positions, unexpedite

timm = pytest.importorskip("timm")


def test_positions_are_weighted_as_centres_are():
    torch.manual_seed(0)
    x, size, grid = torch.randn(2, 42, 4), (6, 7), (3, 2)
    clusters = cluster_tokens(x, size, grid, iterations=2, window=3, temperature=0.3)
    _, affinity = reference.cluster(x, size, grid, 2, 3, 0.3)
    own = torch.cartesian_prod(torch.arange(6.0), torch.arange(7.0))
    expected = affinity.transpose(1, 2) @ own / affinity.sum(1)[..., None]
    torch.testing.assert_close(clusters.positions(), expected)
    fine = cluster_tokens(x, size, size, iterations=0).positions()
    assert torch.equal(fine, own.expand(2, -1, -1))


@pytest.mark.parametrize("heads", [0, 3])
def test_rotary_tables_between_tokens(heads):
    torch.manual_seed(0)
    size, lead = (5, 7), (heads,) if heads else ()
    steps = torch.rand(2, *lead, 1, 8, dtype=torch.float64) * 6 - 3  # below pi

    def angles(at):
        return 0.4 + at[..., :1] * steps[0] + at[..., 1:] * steps[1]

    own = torch.cartesian_prod(torch.arange(5.0), torch.arange(7.0)).double()
    at = torch.rand(2, 6, 2, dtype=torch.float64) * torch.tensor([4, 6])
    full = angles(own)
    expected = angles(at[:, None] if heads else at)
    if not heads:
        expected = expected[:, None]
    sin, cos = positions.rotated(full.sin(), full.cos(), size, at, "here")
    torch.testing.assert_close(sin, expected.sin())
    torch.testing.assert_close(cos, expected.cos())
    assert positions.linear(full.sin(), full.cos(), size)
    assert not positions.linear(full.square().sin(), full.square().cos(), size)
    with pytest.raises(ValueError, match=r"here: expected rotary tables \(24, D\)"):
        positions.rotated(full.sin(), full.cos(), (4, 6), at, "here")


def test_relative_bias_between_tokens():
    model, _, size = made("beit")
    attention = model.blocks[0].attn
    table = attention.relative_position_bias_table.detach()
    whole = attention._get_rel_pos_bias().detach()
    own = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0))
    torch.testing.assert_close(positions.between(table, size, own[None]), whole)
    some = torch.tensor([0, 7, 3, 22])
    at = torch.cat((torch.zeros(1, dtype=torch.long), some + 1))
    found = positions.between(table, size, own[some][None])
    torch.testing.assert_close(found, whole[:, :, at][..., at])
    half = positions.between(table, size, torch.tensor([[[1.0, 1.5], [1.0, 1.0]]]))
    torch.testing.assert_close(half[0, :, 1, 2], whole[0, :, 9, [8, 9]].mean(1))


@pytest.mark.parametrize(
    "family",
    ["vit", "eva02", *(pytest.param(f, marks=pytest.mark.long) for f in ("beit", "hf_dinov2"))],
)
def test_compiled_whole(family):
    model, x, _ = made(family)
    expedite(model, 1, (3, 4), 3)

    def call(model, x):
        if family == "hf_dinov2":
            return list(model(x)[:1])
        final, maps = model.forward_intermediates(x)
        return [final, *maps]

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        expected = call(model, x)
        torch.compiler.reset()
        backend = aot_autograd(fw_compiler=keep)
        found = torch.compile(call, fullgraph=True, backend=backend)(model, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_the_compiler_drops_maps_that_nobody_reads():
    model, x, _ = made("vit")
    expedite(model, 1, (3, 4))
    rebuilt = []
    # Of the kernels, or of the formulas.
    rebuilds = (torch.ops.casvit_kernels.reconstruct_tokens.default, torch.ops.aten.topk.default)

    def count(graph, inputs):
        rebuilt.append(sum(node.target in rebuilds for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count))(x)
    assert rebuilt == [1]


@pytest.mark.long
def test_compiled_and_exported_like_the_model_itself():
    torch.manual_seed(0)
    model = timm_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    expedite(model, 1, (2, 3))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in ((64, 96), (96, 64), (64, 64)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit"])
def test_gradients(family):
    model, x, _ = made(family)
    model.double()
    x = x.double().requires_grad_()
    expedite(model, 2, (3, 4), **{**WHOLE, "neighbours": 1})

    def loss(x):
        final, maps = model.forward_intermediates(x)
        return final.square().mean() + sum(m.cos().mean() for m in maps)

    loss(x).backward()
    assert all(
        p.grad is not None for name, p in model.named_parameters() if name.startswith("blocks")
    )
    with torch.no_grad():
        step = torch.randn_like(x)
        # A centre that a token is nearest to is a piecewise constant choice: small steps stay in it.
        slope = (loss(x + 1e-5 * step) - loss(x - 1e-5 * step)) / 2e-5
    torch.testing.assert_close((x.grad * step).sum(), slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_look_without_gradients_costs_nobody_theirs(mode):
    model, x, _ = made("vit")
    expedite(model, 1, (3, 4))

    def look(block, arguments, output):
        with mode():
            output.mean()
        output.square().mean().backward(retain_graph=True)

    model.blocks[1].register_forward_hook(look)
    model(x)
    assert model.blocks[1].mlp.fc2.weight.grad.abs().sum() > 0


def test_checkpointing_of_transformers_and_not_of_timm():
    model, x, _ = made("hf_dinov2")
    expedite(model, 1, (3, 4))
    model.train()
    grads = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(x)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))
    model, x, _ = made("vit")
    expedite(model, 1, (3, 4))
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"blocks\[1\]: expected gradient checkpointing to be off"):
        model(x)


@pytest.mark.parametrize(("first", "reentrant"), [(1, False), (1, True), (2, True)])
def test_checkpointing_of_ones_own_is_refused(first, reentrant):
    model, x, _ = made("vit")
    expedite(model, 1, (3, 4))

    def step():
        y = model._pos_embed(model.patch_embed(x))
        for index, block in enumerate(model.blocks):
            y = checkpoint(block, y, use_reentrant=reentrant) if index >= first else block(y)
        y.square().mean().backward()

    with pytest.raises((ValueError, RuntimeError), match=r"checkpointing|the very output of"):
        step()


def test_blocks_compiled_apart_are_refused():
    model, x, _ = made("vit")
    expedite(model, 1, (3, 4))
    for block in model.blocks:
        block.compile(backend="eager")
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"torch.compile has to take the model whole"),
    ):
        model(x)


def test_threads_do_not_share_a_call():
    torch.manual_seed(0)
    model = timm_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    expedite(model, 1, (2, 2))
    images = [torch.randn(1, 3, *size) for size in ((32, 128), (128, 32), (64, 64))] * 4

    def run(x):
        with torch.no_grad():
            return model(x)

    expected = [run(x) for x in images]
    with ThreadPoolExecutor(3) as pool:
        assert all(map(torch.equal, pool.map(run, images), expected))


def test_low_precision_and_inference_mode():
    model, x, _ = made("dinov3")
    expedite(model, 1, (3, 4))
    expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
        [maps] = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        assert maps.shape == (2, 48, 5, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        assert half(x.bfloat16()).dtype == torch.bfloat16


def test_what_changes_between_blocks_is_refused():
    class Between(nn.Module):
        def __init__(self, change):
            super().__init__()
            source = timm_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, num_heads=4)
            self.patch_embed, self.blocks, self.change = source.patch_embed, source.blocks, change

        def forward(self, x):
            x = self.patch_embed(x)
            for block in self.blocks:
                x = block(x)
                self.change(x)
                x = x + 1 if self.change is torch.clone else x
            return x

    x = torch.randn(1, 3, 64, 64)

    def write(t):
        with torch.no_grad():
            t.add_(1)
        t.sum()

    for change, words in ((torch.clone, "another tensor"), (write, "written to")):
        model = Between(change)
        expedite(model, 1, (2, 2))
        with pytest.raises(RuntimeError, match=rf"blocks\[2\]: .*{words}"):
            model(x)
        with torch.no_grad(), pytest.raises(RuntimeError, match=rf"blocks\[2\]: .*{words}"):
            model(x)


def test_blocks_that_add_in_place():
    """To centres, of which the map is rebuilt: with no class token they were given those themselves."""

    class Block(nn.Linear):
        def forward(self, x):
            x += super().forward(x)
            return x

    class Copying(Block):
        def forward(self, x):
            return super().forward(x.clone())

    results = []
    for kind in (Block, Copying):
        torch.manual_seed(0)
        blocks = nn.Sequential(*(kind(8, 8) for _ in range(3)))
        model = nn.Sequential(blocks)
        expedite(model, 1, (3, 4), blocks=blocks, size=(5, 6), prefix=0)
        with torch.no_grad():
            results.append(model(torch.randn(2, 30, 8)))
    assert torch.equal(*results)


def test_masks_of_the_full_map_are_refused():
    model, x, _ = made("vit")
    expedite(model, 1, (3, 4))
    with pytest.raises(ValueError, match=r"blocks\[1\]: attn_mask: got a tensor \(25, 25\)"):
        model(x, attn_mask=torch.zeros(25, 25))


def test_blocks_with_windows_are_refused():
    transformers = pytest.importorskip("transformers")
    sam = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, window_size=2
    )
    plain = {"pretrained": False, "img_size": 64, "depth": 3}
    models = (
        (transformers.SamVisionModel(sam), "it has windows of fixed size"),
        (timm.create_model("samvit_base_patch16", **plain), "it has windows of fixed size"),
        (timm.create_model("vit_relpos_small_patch16_224", **plain), "attn.rel_pos has windows"),
    )
    for model, words in models:
        with pytest.raises(
            ValueError, match=rf"\[1\]: it cannot run on cluster centres: .*{words}"
        ):
            expedite(model, 1, (2, 2))
        assert not any(m._forward_pre_hooks for m in model.modules())
    # Global attention with a table of its own: no window, and not served either.
    whole = transformers.SamVisionModel(sam)
    for layer in whole.vision_encoder.layers:
        layer.window_size = 0
    with pytest.raises(
        ValueError, match=r"its attn has relative positions of its own \(rel_pos_h\)"
    ):
        expedite(whole, 1, (2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"at": 3, "until": 3}, ValueError, r"1 <= at < until <= 4, .* got 3 and 3"),
        ({"at": 4}, ValueError, "got 4 and 4"),
        ({"at": 0}, ValueError, "got 0 and 4"),
        ({"until": 5}, ValueError, "got 1 and 5"),
        ({"at": 1.0}, TypeError, "at: expected a whole number of blocks, got 1.0"),
        ({"blocks": "stages"}, ValueError, "blocks: VisionTransformer has no 'stages'"),
        ({"blocks": "norm"}, ValueError, "blocks: expected 'norm' to be an nn.Sequential"),
        ({"blocks": nn.ModuleList()}, ValueError, "blocks: expected a list inside"),
        ({"blocks": 3}, TypeError, "blocks: expected the dotted name"),
        ({"window": 4}, ValueError, "window: expected an odd number"),
        ({"neighbours": 0}, ValueError, "neighbours: expected at least 1, got 0"),
        ({"norm": "l1"}, ValueError, "norm: expected 'l2' or 'sum'"),
        ({"reconstruction_window": 2}, ValueError, "window: expected an odd number"),
        ({"size": (2, 2)}, ValueError, "grid: expected at most the map's 2 x 2, got 3 x 4"),
        ({"prefix": -1}, ValueError, "prefix: expected a number of tokens"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, words):
    model, _, _ = made("vit")
    with pytest.raises(error, match=words):
        expedite(model, **{"at": 1, "grid": (3, 4), **arguments})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_order_and_bad_calls():
    model, x, _ = made("vit")
    with pytest.raises(ValueError, match="model: expected an expedited model, it is not"):
        unexpedite(model)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        expedite("vit")
    with pytest.raises(TypeError, match="model: expected a module that is not compiled, got"):
        expedite(torch.compile(model), 1, (3, 4))
    expedite(model, 1, (3, 4), prefix=2)
    with pytest.raises(RuntimeError, match="model: it is expedited already: call unexpedite"):
        expedite(model, 2, (2, 2))
    with pytest.raises(ValueError, match=r"4 x 6 = 24 tokens, the block was given 25, of which 2"):
        model(x)
    outer = nn.Sequential(model)
    with pytest.raises(ValueError, match="model: its 0 is what was expedited"):
        unexpedite(outer)
    with pytest.raises(RuntimeError, match="model: 0 is expedited already"):
        expedite(outer, 1, (3, 4), blocks="0.blocks")
    with pytest.raises(ValueError, match="got a part of it"):
        unexpedite(model.blocks)
    both = nn.ModuleDict(
        {"a": hugging_face("ViT", "Model"), "b": timm_model("vit_tiny_patch16_224")}
    )
    with pytest.raises(ValueError, match=r"found several lists of blocks, .*'b.blocks'"):
        expedite(both, 1, (3, 4))
    with pytest.raises(ValueError, match=r"found no nn.Sequential or nn.ModuleList"):
        expedite(nn.Linear(2, 2), 1, (3, 4))
