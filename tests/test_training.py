"""Training on a backend's kernels: gradients, statistics, what is kept, what is computed, by whom."""

import contextlib
import copy
import importlib.util
import itertools
import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import BACKEND, require_backend
from mixers import filled, plain_copy
from torch import nn
from torch.func import functional_call

from casvit_kernels import FusedCATM, catm
from casvit_kernels.ops.mixer import autograd as steps
from casvit_kernels.ops.mixer import reference
from casvit_kernels.ops.mixer.autograd import mix_training
from casvit_kernels.ops.mixer.kernels import get
from casvit_kernels.ops.mixer.schema import Settings
from casvit_kernels.ops.mixer.weights import GateWeights, MixerWeights, flatten, unflatten

_PATH = Path(__file__).parents[1] / "bench" / "static" / "saved_bytes.py"
_SPEC = importlib.util.spec_from_file_location("bench_saved_bytes", _PATH)
saved_bytes = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(saved_bytes)

BOTH = list(itertools.product((False, True), repeat=2))
EPS = (1e-5, 1e-4)


@pytest.fixture(autouse=True)
def _setup():
    require_backend(BACKEND)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def mixer():
    return filled(FusedCATM(5, True, backend=BACKEND)).train()


@pytest.fixture
def x():
    return torch.randn(3, 5, 6, 7) + 0.3


def norms(mixer):
    return mixer.oper_q[0].block[1], mixer.oper_k[0].block[1]


def weights(dim=5, bias=True, affine=True, running=(True, True), dtype=torch.float32):
    def gate(kept):
        return GateWeights(
            torch.randn(dim, 1, 3, 3),
            torch.randn(dim),
            torch.randn(dim) if affine else None,
            torch.randn(dim) if affine else None,
            torch.randn(dim) if kept else None,
            torch.rand(dim) + 0.5 if kept else None,
            torch.randn(1, dim, 1, 1),
            torch.randn(dim, dim, 1, 1),
        )

    w = MixerWeights(
        torch.randn(3 * dim, dim, 1, 1),
        torch.randn(3 * dim) if bias else None,
        gate(running[0]),
        gate(running[1]),
        torch.randn(dim, 1, 3, 3),
        torch.randn(dim),
        torch.randn(dim, 1, 3, 3),
        torch.randn(dim),
    )
    return unflatten([t if t is None else t.to(dtype) for t in flatten(w)])


def requires_grad(w):
    for i, t in enumerate(flatten(w)):
        if t is not None and i not in (6, 7, 14, 15):  # running statistics
            t.requires_grad_()
    return w


def step(module, x, loss=lambda out: out.square().sum()):
    """Output, gradients and buffers of one call, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    loss(out).backward()
    found = {"out": out.detach(), "x": x.grad, **{k: p.grad for k, p in module.named_parameters()}}
    module.zero_grad()
    return {k.removeprefix("_orig_mod."): v for k, v in found.items()} | {
        k.removeprefix("_orig_mod."): b.clone() for k, b in module.named_buffers()
    }


def assert_close(found, expected, tolerance=1e-4, least=1e-2):
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        # The bias before batch statistics has the gradient 0, a sum of terms like its weight's.
        terms = expected.get(name.replace("0.block.0.bias", "0.block.0.weight"), e)
        bound = tolerance * max(e.abs().max().item(), terms.abs().max().item(), least)
        error = (found[name].double() - e.double()).abs().max().item()
        assert error <= bound, f"{name}: {error:.3g}"


# Values


@pytest.mark.parametrize("batch", BOTH, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_combination_of_norms(x, batch, affine, memory_format):
    mixer = FusedCATM(5, True, backend=BACKEND).train()
    for gate, training in zip((mixer.oper_q, mixer.oper_k), batch, strict=True):
        gate[0].block[1] = nn.BatchNorm2d(5, eps=0.03, affine=affine).train(training)
    filled(mixer)
    expected = step(plain_copy(mixer), x.double())
    x = x.contiguous(memory_format=memory_format)
    found = step(mixer, x)
    assert_close(found, expected)
    assert found["out"].stride() == found["x"].stride() == x.stride()


def test_a_norm_told_not_to_track(mixer, x):
    """PyTorch then neither reads nor writes the running statistics that are there."""
    for norm in norms(mixer):
        norm.track_running_stats = False
    before = copy.deepcopy(mixer.state_dict())
    expected = step(plain_copy(mixer), x.double())
    assert_close(step(mixer, x), expected)
    assert all(torch.equal(v, before[k]) for k, v in mixer.state_dict().items())


@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_follow_batch_norm_exactly(mixer, x, momentum):
    """Over a few batches of other sizes, with an empty one between."""
    for norm in norms(mixer):
        norm.momentum = momentum
    plain = plain_copy(mixer)
    for batch in (x, x[:1, :, :3] - 1, x[:0], x[:, :, :, 2:] * 2):
        mixer(batch)
        plain(batch.double())
    for a, b in zip(mixer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-6)
    assert norms(mixer)[0].num_batches_tracked == 4


def test_large_offsets_lose_no_digits():
    """Variance of values far from zero: a sum of squares in float32 would be off by far more."""
    torch.manual_seed(1)
    mixer = filled(FusedCATM(5, True, backend=BACKEND)).train()
    with torch.no_grad():
        mixer.oper_q[0].block[0].bias += 3000.0
    x = torch.randn(4, 5, 16, 16)
    plain = plain_copy(mixer)
    mixer(x), plain(x.double())
    torch.testing.assert_close(
        norms(mixer)[0].running_var, norms(plain)[0].running_var.float(), rtol=1e-4, atol=0
    )


def test_one_value_per_channel_changes_nothing(mixer):
    before = copy.deepcopy(mixer.state_dict())
    with pytest.raises(ValueError, match=r"x: expected more than 1 value .* \(1, 5, 1, 1\)"):
        mixer(torch.randn(1, 5, 1, 1))
    assert all(torch.equal(v, before[k]) for k, v in mixer.state_dict().items())
    for norm in norms(mixer):
        norm.eval()
    assert mixer(torch.randn(1, 5, 1, 1)).shape == (1, 5, 1, 1)


@pytest.mark.parametrize("batch", BOTH, ids=str)
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_the_function(x, batch, backend):
    w, twin = weights(), weights()
    for a, b in zip(flatten(twin), flatten(w), strict=True):
        a.copy_(b)
    out = catm(x, w, eps=EPS, training=batch, momentum=(0.2, 0.7), backend=backend)

    def norm(i):
        g = twin[2 + i]
        return lambda d: F.batch_norm(
            d, *g[4:6], *g[2:4], training=batch[i], momentum=(0.2, 0.7)[i], eps=EPS[i]
        )

    torch.testing.assert_close(out, reference.catm(x, twin, norm(0), norm(1)), rtol=1e-4, atol=1e-4)
    for a, b in zip(flatten(w), flatten(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_function_without_running_statistics(x):
    w = weights(running=(False, True))
    out = catm(x, w, training=(True, False), backend=BACKEND)
    expected = catm(x, w, training=(True, False), backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected running statistics .* got None"):
        catm(x, w, training=(False, True), backend=BACKEND)


@pytest.mark.parametrize("missing", ["norm_mean", "norm_var"])
def test_half_of_the_running_statistics(x, missing):
    w = weights()
    w = w._replace(k=w.k._replace(**{missing: None}))
    before = copy.deepcopy(w)
    with pytest.raises(ValueError, match=rf"weights\.k: expected both .* got no {missing}"):
        catm(x, w, training=True, backend=BACKEND)
    assert torch.equal(w.q.norm_mean, before.q.norm_mean)


@pytest.mark.parametrize(
    "wrong",
    [
        {"training": [True, True]},
        {"training": (True,)},
        {"training": "q"},
        {"momentum": (0.1,)},
        {"momentum": None},
        {"momentum": (0.1, 0.1, 0.1)},
    ],
    ids=str,
)
def test_wrong_arguments_of_the_function(x, wrong):
    w = weights()
    before = copy.deepcopy(w)
    with pytest.raises(TypeError, match=rf"{next(iter(wrong))}: expected a .* got"):
        catm(x, w, **{"training": True, "backend": BACKEND, **wrong})
    assert torch.equal(w.q.norm_mean, before.q.norm_mean)


# What is kept for the backward, what is computed in it


@pytest.mark.parametrize("batch", BOTH, ids=str)
def test_only_the_input_and_vectors_are_kept(mixer, batch):
    for norm, training in zip(norms(mixer), batch, strict=True):
        norm.train(training)
    x = torch.randn(2, 5, 40, 41)
    found = saved_bytes.kept(mixer, x)
    assert found.pop(x.data_ptr()) == x.nbytes
    maps = 2 * 4 * 2 * 40 * 41  # the spatial gates
    assert sum(found.values()) <= maps + 4 * (4 * 5 + 4 * 2 * 5) + 8


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("model", saved_bytes.MODELS)
def test_at_most_a_fifth_of_eager_is_kept(model, stage):
    row = saved_bytes.measure(model, stage)
    assert row["fused_bytes"] <= row["eager_bytes"] / 5
    (committed,) = (
        r
        for r in json.loads(saved_bytes.RESULTS.read_text())["rows"]
        if (r["model"], r["stage"]) == (model, stage)
    )
    assert committed["fused_bytes"] == row["fused_bytes"]


class Counted:
    """The phases of a backend, with a list of the calls."""

    def __init__(self, phases):
        self.phases, self.calls = phases, []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name if name != "project_backward" else (name, *args[-1]))
            return getattr(self.phases, name)(*args)

        return call


@pytest.fixture
def counted(monkeypatch):
    counted = Counted(get(BACKEND).phases)
    monkeypatch.setattr(get(BACKEND), "phases", counted)
    return counted


_COMBINE = ["project", "backward_combine"]
_GATE = [*_COMBINE, "backward_gate"]
_DEPTHWISE = [*_GATE, "backward_depthwise"]


@pytest.mark.parametrize(
    ("wanted", "calls"),
    [
        (["proj.bias"], _COMBINE),
        (["dwc.weight", "oper_q.1.block.1.weight"], _COMBINE),
        (["oper_k.0.block.3.weight"], _GATE),
        (["oper_q.0.block.1.weight"], _GATE),
        (["oper_k.0.block.1.bias", "proj.weight"], _GATE),
        (["oper_q.0.block.0.weight"], _DEPTHWISE),
        (["oper_k.0.block.0.bias"], _DEPTHWISE),
        (["x"], [*_DEPTHWISE, ("project_backward", True, False, False)]),
        (["qkv.weight"], [*_DEPTHWISE, ("project_backward", False, True, False)]),
        (["qkv.bias", "x"], [*_DEPTHWISE, ("project_backward", True, False, True)]),
    ],
    ids=str,
)
def test_frozen_parts_cost_nothing(mixer, x, counted, wanted, calls):
    expected = step(copy.deepcopy(mixer), x)
    mixer.requires_grad_(False)
    x.requires_grad_("x" in wanted)
    targets = [x if name == "x" else mixer.get_parameter(name).requires_grad_() for name in wanted]
    loss = mixer(x).square().sum()
    counted.calls.clear()
    loss.backward()
    assert counted.calls == calls
    for name, target in zip(wanted, targets, strict=True):
        assert torch.equal(target.grad, expected[name])
    assert [n for n, p in mixer.named_parameters() if p.grad is not None] == [
        n for n, _ in mixer.named_parameters() if n in wanted
    ]


def test_nothing_but_the_forward_without_gradients(mixer, x, counted):
    with torch.no_grad():
        assert not mixer(x).requires_grad
    assert not mixer.requires_grad_(False)(x).requires_grad
    assert counted.calls == 2 * ["project", "statistics", "mix"]


@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_the_same_bits_again(mixer, mode):
    x = torch.randn(4, 5, 23, 19)
    if mode == "frozen":
        for norm in norms(mixer):
            norm.eval()
    state = copy.deepcopy(mixer.state_dict())
    first = step(mixer, x)
    mixer.load_state_dict(state)
    again = step(mixer, x)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


# The operators


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (0, 5, 3, 3), (2, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(True, True), (False, True)], ids=str)
def test_opcheck_mix_training(shape, memory_format, dtype, batch):
    w = requires_grad(weights(running=[not b for b in batch], dtype=dtype))
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    settings = Settings(*EPS, *batch, None, BACKEND, "")
    torch.library.opcheck(torch.ops.casvit_kernels.mix_training, (x, *flatten(w), *settings))


@pytest.mark.long
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (0, 5, 3, 3)], ids=str)
def test_opcheck_mix_backward(shape, bias, affine):
    w = weights(bias=bias, affine=affine, running=(False, False))
    x = torch.randn(shape)
    settings = Settings(*EPS, True, True, None, BACKEND, "")
    out, saved = mix_training(x, w, settings)
    requires_grad(w)
    x.requires_grad_()
    grad = torch.randn_like(out).requires_grad_()
    for needed in (
        [t is not None and t.requires_grad for t in (x, *flatten(w))],
        [i in (1, 9) for i in range(23)],
    ):
        arguments = (grad, x, *flatten(w), *settings, *saved, needed)
        torch.library.opcheck(torch.ops.casvit_kernels.mix_backward, arguments)


def test_a_backend_without_training_says_so(x):
    settings = Settings(*EPS, True, True, None, "reference", "")
    with pytest.raises(RuntimeError, match="'reference' has no training kernels"):
        mix_training(x, weights(), settings)


@pytest.mark.parametrize("expand", [False, True])
def test_gradients_of_any_strides(mixer, x, expand):
    grad = torch.randn(3, 5, 1, 1).expand(3, 5, 6, 7) if expand else torch.randn(3, 5, 7, 6).mT
    expected = step(plain_copy(mixer), x.double(), lambda out: (out * grad.double()).sum())
    found = step(
        mixer, x, lambda out: (out * 1).backward(grad) or out.new_zeros((), requires_grad=True)
    )
    assert_close(found, expected)


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_have_the_strides_of_their_weights(mixer, x, images, training):
    """DistributedDataParallel compares them to the last, in models that are channels last too."""
    expected = step(copy.deepcopy(mixer).train(training), x[:images])
    mixer.to(memory_format=torch.channels_last).train(training)
    mixer.proj.weight = nn.Parameter(mixer.proj.weight.mT.contiguous().mT)
    assert mixer.qkv.weight.stride() == (5, 1, 5, 5)
    found = step(mixer, x[:images])
    for name, p in mixer.named_parameters():
        assert found[name].stride() == p.stride(), name
        assert torch.equal(found[name], expected[name]), name


# Second derivatives, torch.func


@pytest.mark.parametrize("batch", BOTH, ids=str)
@pytest.mark.parametrize("wanted", ["x", "qkv.weight", "oper_k.0.block.1.weight"])
def test_second_derivatives(mixer, x, batch, wanted):
    """Of the mixer applied twice: the second input is computed from the weights, too."""
    for norm, training in zip(norms(mixer), batch, strict=True):
        norm.train(training)
    found = []
    for module, dtype in ((mixer, torch.float32), (plain_copy(mixer), torch.float64)):
        y = x.to(dtype).requires_grad_()
        target = y if wanted == "x" else module.get_parameter(wanted)
        loss = module(module(y)).square().sum()
        (g,) = torch.autograd.grad(loss, target, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), target)
        found.append({"first": g.detach(), "second": second})
    assert_close(*found, 1e-3)


def test_gradient_penalty(mixer, x):
    """All gradients of a loss that holds a gradient, as users write it."""
    found = []
    for module, dtype in ((mixer, torch.float32), (plain_copy(mixer), torch.float64)):
        y = x.to(dtype).requires_grad_()
        out = module(y)
        (g,) = torch.autograd.grad(out.sum(), y, create_graph=True)
        (out.square().mean() + (g.flatten(1).norm(dim=1) - 1).square().mean()).backward()
        found.append({k: p.grad for k, p in module.named_parameters()})
    assert_close(*found, 1e-3)


def test_third_derivatives_where_pytorch_has_them(mixer, x):
    for norm in norms(mixer):
        norm.eval()  # batch_norm itself stops at the second in training
    found = []
    for module, dtype in ((mixer, torch.float32), (plain_copy(mixer), torch.float64)):
        y = (0.3 * x).to(dtype).requires_grad_()
        g = module(y).square().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), y, create_graph=True)
        found.append({"third": g.detach()})
    assert_close(*found, 1e-3)


def test_func_grad(mixer, x):
    parameters, buffers = dict(mixer.named_parameters()), dict(mixer.named_buffers())
    twin = copy.deepcopy(mixer)

    def loss(p, x):
        own = {k: b.clone() for k, b in buffers.items()}
        return functional_call(mixer, (p, own), (x,)).square().sum()

    by_parameters, by_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    expected = step(twin, x)
    found = {"x": by_x, **by_parameters}
    assert_close(found, {k: expected[k] for k in found})


def test_gradients_of_each_sample_with_frozen_norms(mixer, x):
    for norm in norms(mixer):
        norm.eval()
    parameters, buffers = dict(mixer.named_parameters()), dict(mixer.named_buffers())

    def loss(p, xi):
        return functional_call(mixer, (p, buffers), (xi[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = step(mixer, x[i : i + 1])
        assert_close({k: g[i] for k, g in found.items()}, {k: expected[k] for k in found})


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_vectors_is_refused(mixer, x, training):
    """`is_grads_batched` and vmap over `torch.autograd.grad`; torch.func.vjp serves them."""
    mixer.train(training)
    x.requires_grad_()
    out = mixer(x)
    vectors = torch.randn(2, *out.shape)

    def product(vector, **batched):
        return torch.autograd.grad(out, x, vector, retain_graph=True, **batched)[0]

    for call in (
        lambda: product(vectors, is_grads_batched=True),
        lambda: torch.vmap(product)(vectors),
    ):
        with pytest.raises(NotImplementedError, match=r"batch of vectors.*torch\.func\.vjp"):
            call()
    expected = torch.stack([product(v) for v in vectors])
    for norm in norms(mixer):
        norm.track_running_stats = False  # a transform may not write them
    mixer.requires_grad_(False)
    _, pull = torch.func.vjp(mixer, x.detach())
    (found,) = torch.vmap(pull)(vectors)
    assert_close({"x": found}, {"x": expected})


# torch.compile


def test_compiled_step(mixer, x):
    eager = copy.deepcopy(mixer)
    compiled = torch.compile(mixer, fullgraph=True)
    assert_close(step(compiled, x), step(eager, x))


def test_a_compiler_warns_of_nothing(mixer, x, recwarn):
    torch._dynamo.utils.warn_once_cache.clear()
    step(torch.compile(mixer, fullgraph=True, backend="aot_eager"), x)
    assert [str(w.message) for w in recwarn if "casvit_kernels" in str(w.message)] == []


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("marked", [False, True])
def test_compiled_once_for_all_sizes(mixer, momentum, marked):
    for norm in norms(mixer):
        norm.momentum = momentum
    eager = copy.deepcopy(mixer)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    sizes = [(6, 7), (8, 9), (5, 11), (14, 3)]
    for i, (h, w) in enumerate(sizes):
        x = torch.randn(3, 5, h, w)
        if marked:
            torch._dynamo.mark_dynamic(x, 2)
            torch._dynamo.mark_dynamic(x, 3)
        # Unmarked, the second size compiles for all others.
        frozen = torch._dynamo.config.patch(error_on_recompile=True)
        with frozen if i > 1 - marked else contextlib.nullcontext():
            x.requires_grad_()
            out = compiled(x)
            out.square().sum().backward()
        expected = step(eager, x)
        assert_close({"x": x.grad, "out": out.detach()}, {k: expected[k] for k in ("x", "out")})
        mixer.zero_grad()
    assert counter.frame_count == 2 - marked
    for a, b in zip(mixer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_compiler_sees_one_operator(mixer, x):
    recorder = torch._dynamo.testing.AotEagerAndRecordGraphs()
    step(torch.compile(mixer, fullgraph=True, backend=recorder), x)
    for graphs, name in (
        (recorder.fw_graphs, "mix_training"),
        (recorder.bw_graphs, "mix_backward"),
    ):
        (graph,) = graphs
        own = [str(n.target) for n in graph.graph.nodes if "casvit_kernels" in str(n.target)]
        assert own == [f"casvit_kernels.{name}.default"]
        assert not any("convolution" in str(n.target) for n in graph.graph.nodes)


# Autocast and narrow dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_gradient_scaler(mixer, dtype):
    x = torch.randn(3, 5, 9, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    truth = step(plain_copy(mixer), x.double())
    found = []
    for module in (mixer, plain_copy(mixer, torch.float32)):
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            out = module(y)
            loss = out.float().square().sum()
        scaler.scale(loss).backward()
        assert out.dtype is dtype
        assert all(t.grad.dtype is torch.float32 for t in (y, *module.parameters()))
        grads = {"x": y.grad, **{k: p.grad for k, p in module.named_parameters()}}
        grads = {k: g / scaler.get_scale() for k, g in grads.items()}
        found.append({**grads, **dict(module.named_buffers())})
    for name, g in truth.items():
        if name == "out" or "num_batches" in name:
            continue
        own = (found[1][name] - g).abs().max().item()
        least = torch.finfo(dtype).eps * g.abs().max().item()
        assert (found[0][name] - g).abs().max().item() <= 4 * max(own, least), name


def test_autocast_around_the_backward_too(mixer, x):
    expected = step(copy.deepcopy(mixer), x)
    y = x.clone().requires_grad_()
    loss = mixer(y).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert torch.equal(y.grad, expected["x"])
    assert torch.equal(mixer.qkv.weight.grad, expected["qkv.weight"])


@pytest.mark.parametrize("autocast", [False, True])
def test_large_activations_in_float16(autocast):
    """6e4 is near the largest float16: sums and gates inside have the range of float32."""
    mixer = filled(FusedCATM(16, True, backend=BACKEND)).train()
    with torch.no_grad():
        mixer.proj.weight.mul_(1e-9)  # a product of two large values comes out
        mixer.proj.bias.zero_()
    x = torch.randn(2, 16, 8, 8).clamp(-1, 1) * 6e4
    if not autocast:
        mixer, x = mixer.half(), x.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = step(mixer, x, lambda out: out.float().mean())
    wide = plain_copy(mixer, torch.float32)
    expected = step(wide, x.float(), lambda out: out.mean())
    assert found["out"].isfinite().all()
    torch.testing.assert_close(found["out"].float(), expected["out"], rtol=2e-2, atol=2e-2)
    for name, value in expected.items():
        if value.abs().max() < 6e4:
            assert found[name].isfinite().all(), name


# Modules


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_trains_on_alike(mixer, x, how):
    step(mixer, x)
    twin = how(mixer)
    mine, theirs = step(mixer, x + 1), step(twin, x + 1)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_two_threads():
    mixers = [filled(FusedCATM(5, True, backend=BACKEND), seed).train() for seed in range(2)]
    inputs = [torch.randn(2, 5, 12 + seed, 9) for seed in range(2)]
    expected = [step(copy.deepcopy(m), x) for m, x in zip(mixers, inputs, strict=True)]
    found = [[], []]

    def work(i):
        for _ in range(10):
            found[i].append(step(copy.deepcopy(mixers[i]), inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for one, results in zip(expected, found, strict=True):
        assert len(results) == 10
        for result in results:
            assert all(torch.equal(result[name], value) for name, value in one.items())


def test_train_and_eval_alternate(mixer, x):
    plain = plain_copy(mixer)
    for training in (True, False, True, False):
        mixer.train(training)
        plain.train(training)
        assert_close(step(mixer, x), step(plain, x.double()))
        with torch.no_grad():
            for p, q in zip(mixer.parameters(), plain.parameters(), strict=True):
                p.mul_(0.9)
                q.mul_(0.9)


def test_an_input_written_after_the_call_is_refused(mixer, x):
    y = x.clone().requires_grad_() * 1
    out = mixer(y)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_frozen_statistics_written_after_the_call(mixer, x):
    """As when the same mixer runs frozen, then in training, then backward."""
    norms(mixer)[0].eval()
    expected = step(copy.deepcopy(mixer), x)
    y = x.clone().requires_grad_()
    loss = mixer(y).square().sum()
    norms(mixer)[0].running_mean.add_(1)
    loss.backward()
    assert torch.equal(y.grad, expected["x"])


# SyncBatchNorm: two processes, each with a part of the batch, against one with all of it

_PARTS = ((2, 2), (3, 1), (0, 4))


def _process(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        results = {parts: _synchronised(rank, parts) for parts in _PARTS}
        results["refused"] = _refusals(rank)
        results["few"] = _few(rank)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _batch():
    return torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(3))


def _synchronised(rank, parts):
    mixer = filled(FusedCATM(5, True, backend=BACKEND)).train()
    mixer = nn.SyncBatchNorm.convert_sync_batchnorm(mixer)
    found = step(mixer, _batch().split(parts)[rank])
    # Frozen in one gate, without a gradient of x in the other.
    norms(mixer)[0].eval()
    return found, step(mixer, _batch().split(parts)[rank])


def _few(rank):
    """Statistics of an empty batch, and of a single value, over all processes."""
    mixer = nn.SyncBatchNorm.convert_sync_batchnorm(filled(FusedCATM(5, True, backend=BACKEND)))
    found = step(mixer, _batch()[:0])
    before = copy.deepcopy(mixer.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel over all processes"):
        mixer(_batch()[: 1 - rank, :, :1, :1])
    return found, all(torch.equal(v, before[k]) for k, v in mixer.state_dict().items())


def _refusals(rank):
    texts = []
    mixer = filled(FusedCATM(5, True, backend=BACKEND)).train()
    half = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(mixer))
    half.oper_q[0].block[1] = nn.BatchNorm2d(5)
    mixer = nn.SyncBatchNorm.convert_sync_batchnorm(mixer)
    x = torch.randn(2, 5, 4, 4, requires_grad=True)

    def second():
        (g,) = torch.autograd.grad(mixer(x).sum(), x, create_graph=True)
        g.sum().backward()

    for call in (lambda: half(x), second):
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


@pytest.mark.long
def test_synchronised_batch_norm(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    mixer = filled(FusedCATM(5, True, backend=BACKEND)).train()
    whole = [step(mixer, _batch())]
    norms(mixer)[0].eval()
    whole.append(step(mixer, _batch()))
    parameters = [name for name, _ in mixer.named_parameters()]
    for parts in _PARTS:
        for expected, a, b in zip(whole, *(r[parts] for r in ranks), strict=True):
            found = {k: torch.cat([a[k], b[k]]) for k in ("out", "x")}
            found |= {k: a[k] + b[k] for k in parameters}
            found |= {k: a[k] for k, _ in mixer.named_buffers()}
            assert_close(found, expected)
            assert all(torch.equal(a[k], b[k]) for k, _ in mixer.named_buffers())
    empty = step(filled(FusedCATM(5, True, backend=BACKEND)), _batch()[:0])
    del empty["out"], empty["x"]
    for r in ranks:
        assert r["few"][0].pop("out").shape == r["few"][0].pop("x").shape == (0, 5, 6, 7)
        assert_close(r["few"][0], empty)
        assert r["few"][1]
        apart, second = r["refused"]
        assert "expected BatchNorms synchronised over the same processes" in apart
        assert "second derivatives" in second


def test_converted_on_one_process(mixer, x):
    expected = step(copy.deepcopy(mixer), x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(mixer)
    assert isinstance(norms(converted)[0], nn.SyncBatchNorm)
    found = step(converted, x)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_nan_in_the_input_reaches_every_gradient_that_plain_pytorch_fills_with_it():
    torch.manual_seed(0)
    require_backend(BACKEND)
    plain = reference.AdditiveTokenMixer(5).train()
    fused = FusedCATM.from_mixer(copy.deepcopy(plain), backend=BACKEND).train()
    x = torch.randn(2, 5, 6, 6)
    x[0, 0, 2, 2] = torch.nan
    for mixer in (plain, fused):
        mixer(x).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(p.grad.isnan(), q.grad.isnan()), name


@pytest.mark.parametrize("images", [2, 4])
def test_with_frozen_statistics_nan_stays_in_its_image(images):
    require_backend(BACKEND)
    mixer = FusedCATM(5, backend=BACKEND).eval()
    x = torch.randn(images, 5, 6, 6, requires_grad=True)
    grad = torch.ones(images, 5, 6, 6)
    grad[1, 0, 2, 2] = torch.nan
    mixer(x).backward(grad)
    others = [i for i in range(images) if i != 1]
    assert x.grad[1].isnan().any()
    assert x.grad[others].isfinite().all()


@pytest.mark.parametrize("batch", BOTH)
@pytest.mark.parametrize("images", [2, 5])
def test_the_whole_step_computes_what_its_phases_do(batch, images, monkeypatch):
    """Only a process group makes the CPU backend go by phases; here it is made to."""
    x, w = torch.randn(images, 19, 6, 7), weights(19)
    grad = torch.randn_like(x)
    settings = Settings(*EPS, *batch, None, "cpu", "")
    every = [True, *(t is not None for t in flatten(w))]
    for index in (7, 8, 15, 16):  # running statistics have no gradients
        every[index] = False

    def step(needed):
        found = steps._forward(x, *flatten(w), *settings)
        return [*found, *steps._backward(grad, x, *flatten(w), *settings, *found[1:], needed)]

    for needed in (every, [n and i > 2 for i, n in enumerate(every)]):
        whole = step(needed)
        with monkeypatch.context() as patched:
            patched.setattr(steps, "WholeStep", type("Nobody", (), {}))
            by_phases = step(needed)
        for a, b in zip(whole, by_phases, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(10.0, float(b.abs().max())))
