"""The operators under torch's machinery: opcheck, compile, autocast, export, functional transforms."""

import copy
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from conftest import require_backend, require_native
from mixers import assert_right, filled, plain_copy
from torch.func import functional_call

from casvit_kernels import FusedCATM
from casvit_kernels.ops.mixer import schema
from casvit_kernels.ops.mixer.schema import pack
from casvit_kernels.ops.mixer.weights import GateWeights, MixerWeights, flatten, unflatten

EPS = (1e-5, 1e-4)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    require_backend(request.param)
    return request.param


@pytest.fixture
def mixer(backend):
    return filled(FusedCATM(5, True, backend=backend)).eval()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def weights(bias=True, affine=True, dtype=torch.float32):
    def gate():
        return GateWeights(
            torch.randn(5, 1, 3, 3),
            torch.randn(5),
            torch.randn(5) if affine else None,
            torch.randn(5) if affine else None,
            torch.randn(5),
            torch.rand(5) + 0.5,
            torch.randn(1, 5, 1, 1),
            torch.randn(5, 5, 1, 1),
        )

    w = MixerWeights(
        torch.randn(15, 5, 1, 1),
        torch.randn(15) if bias else None,
        gate(),
        gate(),
        torch.randn(5, 1, 3, 3),
        torch.randn(5),
        torch.randn(5, 1, 3, 3),
        torch.randn(5),
    )
    return unflatten(tuple(t if t is None else t.to(dtype) for t in flatten(w)))


def requires_grad(w):
    for i, t in enumerate(flatten(w)):
        if t is not None and i not in (6, 7, 14, 15):  # running statistics
            t.requires_grad_()


def all_gradients(module, x, dynamic=()):
    x = x.clone().requires_grad_()
    for d in dynamic:
        torch._dynamo.mark_dynamic(x, d)
    module(x).square().sum().backward()
    found = {"x": x.grad, **{k: p.grad for k, p in module.named_parameters()}}
    module.zero_grad()
    return found


def assert_close(found, expected, tolerance=1e-5):
    for name, e in expected.items():
        error = (found[name].double() - e.double()).abs().max().item()
        assert error <= tolerance * e.abs().max().item(), f"{name}: {error:.3g}"


# opcheck: schema, autograd registration, fake kernels, AOT dispatch with dynamic shapes


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (0, 5, 3, 3), (1, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_project_and_mix(shape, memory_format, packed, dtype):
    require_native()
    w = weights(dtype=dtype)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    packed_weights = pack(w, EPS, dtype) if packed else None
    requires_grad(w)
    for x_needs_grad in (False, True):
        arguments = (x.requires_grad_(x_needs_grad), *flatten(w), *EPS, packed_weights)
        torch.library.opcheck(torch.ops.casvit_kernels.project_and_mix, arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_opcheck_with_parts_missing(bias, affine):
    require_native()
    w = weights(bias, affine)
    requires_grad(w)
    x = torch.randn(2, 5, 4, 3, requires_grad=True)
    op = torch.ops.casvit_kernels.project_and_mix
    torch.library.opcheck(op, (x, *flatten(w), *EPS))
    torch.library.opcheck(op, (x.detach(), *flatten(w), *EPS), {"dtype": torch.bfloat16})
    torch.library.opcheck(torch.ops.casvit_kernels.pack, (*flatten(w), *EPS, torch.float32))


def test_the_operator_takes_any_strides():
    require_native()
    w = weights()
    x = torch.randn(2, 5, 7, 6)
    expected = schema.project_and_mix(x, w, EPS)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.randn(3, 7, 9, 9)[1:, 1:6, 1:8, 1:7].copy_(x),
    ):
        torch.testing.assert_close(schema.project_and_mix(view, w, EPS), expected)
        torch.library.opcheck(torch.ops.casvit_kernels.project_and_mix, (view, *flatten(w), *EPS))


# torch.compile


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_whole(mixer, memory_format):
    x = torch.randn(2, 5, 6, 7).contiguous(memory_format=memory_format)
    compiled = torch.compile(mixer, fullgraph=True)
    with torch.no_grad():
        expected, out = mixer(x), compiled(x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert out.stride() == expected.stride()
        mixer.proj.weight.mul_(2)  # weights are inputs of the graph, not constants
        torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "grad"])
def test_compiled_once_for_all_sizes(mixer, mode):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    for b, h, w in ((2, 6, 7), (3, 8, 9), (4, 5, 11), (7, 14, 3)):
        x = torch.randn(b, 5, h, w)
        for d in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, d)
        if mode == "grad":
            found = all_gradients(compiled, x, dynamic=(0, 2, 3))
            found = {k.removeprefix("_orig_mod."): g for k, g in found.items()}
            assert_close(found, all_gradients(mixer, x))
        else:
            with getattr(torch, mode)():
                torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_dynamic_without_marks(mixer):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for b, h, w in ((2, 6, 7), (3, 8, 9), (4, 5, 11), (7, 14, 3)):
            x = torch.randn(b, 5, h, w)
            torch.testing.assert_close(compiled(x), mixer(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2  # as first seen, then with sizes as variables


def test_compiled_training_keeps_statistics(mixer):
    mixer.train()
    eager = copy.deepcopy(mixer)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 6, 7)
    found = {k.removeprefix("_orig_mod."): g for k, g in all_gradients(compiled, x).items()}
    assert_close(found, all_gradients(eager, x), 1e-4)
    for (name, a), b in zip(mixer.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# Modes of autograd


def test_grad_modes(mixer):
    x = torch.randn(2, 5, 6, 7)
    expected = mixer(x)
    assert expected.requires_grad
    with torch.no_grad():
        out = mixer(x)
        assert not out.requires_grad
        assert torch.equal(out, expected)
    with torch.inference_mode():
        out = mixer(x)
        assert out.is_inference()
        assert torch.equal(out, expected)
    assert mixer(x).requires_grad
    assert not copy.deepcopy(mixer).requires_grad_(False)(x).requires_grad


def test_a_module_of_inference_tensors(backend):
    with torch.inference_mode():
        mixer = filled(FusedCATM(5, backend=backend)).eval()
        x = torch.randn(2, 5, 6, 7)
        assert_right(mixer, x)
        mixer.dwc.weight.mul_(2)  # such tensors count no versions
        assert_right(mixer, x)


@pytest.mark.parametrize("wanted", ["x", "dwc.weight", "oper_k.0.block.1.bias", "qkv.weight"])
def test_gradients_of_some_inputs_only(mixer, wanted):
    x = torch.randn(2, 5, 6, 7)
    expected = all_gradients(mixer, x)[wanted]
    mixer.requires_grad_(False)
    target = x if wanted == "x" else mixer.get_parameter(wanted)
    target.requires_grad_()
    (found,) = torch.autograd.grad(mixer(x).square().sum(), target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_accumulate(mixer):
    x = torch.randn(2, 5, 6, 7)
    once = all_gradients(mixer, x)
    for _ in range(2):
        mixer(x).square().sum().backward()
    assert_close(
        {k: p.grad for k, p in mixer.named_parameters()},
        {k: 2 * g for k, g in once.items() if k != "x"},
    )


def test_activation_checkpointing(mixer):
    x = torch.randn(2, 5, 6, 7)
    expected = all_gradients(mixer, x)
    y = x.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(mixer, y, use_reentrant=False)
    out.square().sum().backward()
    assert_close({"x": y.grad}, {"x": expected["x"]})


def test_backward_after_an_edit_is_refused(mixer):
    x = torch.randn(2, 5, 6, 7, requires_grad=True)
    out = mixer(x)
    with torch.no_grad():
        mixer.dwc.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "qkv.weight", "oper_k.0.block.1.weight"])
def test_second_derivatives(mixer, wanted):
    """Of the mixer applied twice: the second input is computed from the weights, too."""
    found = []
    for module, dtype in ((mixer, torch.float32), (plain_copy(mixer), torch.float64)):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 6, 7).to(dtype).requires_grad_()
        target = x if wanted == "x" else module.get_parameter(wanted)
        loss = module(module(x)).square().sum()
        (g,) = torch.autograd.grad(loss, target, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), target)
        found.append({"first": g.detach(), "second": second})
    assert_close(*found, 1e-4)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("enabled", ["no_grad", "grad"])
def test_autocast(mixer, dtype, enabled):
    x = torch.randn(2, 5, 9, 8)
    eager = plain_copy(mixer, torch.float32)
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(enabled == "grad"):
        out, expected = mixer(x), eager(x)
    assert out.dtype is expected.dtype is dtype
    truth = plain_copy(mixer)(x.double())
    assert _error(out, truth) <= 2 * _error(expected, truth)
    if enabled == "grad":
        assert out.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gradients(mixer, dtype):
    x = torch.randn(2, 5, 9, 8)
    truth = all_gradients(plain_copy(mixer), x.double())
    found = []
    for module in (mixer, plain_copy(mixer, torch.float32)):
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            out = module(y)
        out.float().square().sum().backward()
        found.append({"x": y.grad, **{k: p.grad for k, p in module.named_parameters()}})
    for name, g in truth.items():
        assert found[0][name].dtype is torch.float32
        own = _error(found[1][name], g)
        least = torch.finfo(dtype).eps * g.abs().max().item()
        assert _error(found[0][name], g) <= 4 * max(own, least), name


def test_autocast_takes_inputs_of_other_dtypes(mixer):
    x = torch.randn(2, 5, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(x.half()).dtype is torch.bfloat16
        assert mixer(x.bfloat16()).dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert mixer(x).dtype is torch.float32


def test_autocast_leaves_float64_alone():
    mixer = filled(FusedCATM(5)).eval().double()
    x = torch.randn(2, 5, 6, 7).double()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x)
    assert out.dtype is torch.float64
    assert torch.equal(out, mixer(x))


def test_autocast_compiled(mixer):
    x = torch.randn(2, 5, 6, 7)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out, expected = compiled(x), mixer(x)
    assert out.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected)


def _error(found, truth):
    return (found.double() - truth).abs().max().item()


# Export: goes through the reference formulas by itself


def _targets(program):
    return {str(node.target) for node in program.graph.nodes}


def test_export(mixer):
    x = torch.randn(2, 5, 6, 7)
    program = torch.export.export(mixer, (x,))
    assert not any("casvit" in target for target in _targets(program))
    torch.testing.assert_close(program.module()(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_export_with_dynamic_sizes(mixer):
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    program = torch.export.export(mixer, (torch.randn(2, 5, 6, 7),), dynamic_shapes=shapes)
    for shape in ((3, 5, 9, 8), (2, 5, 4, 11)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_trace(mixer):
    x = torch.randn(2, 5, 6, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(mixer, x)
    assert not any("casvit" in node.kind() for node in traced.inlined_graph.nodes())
    y = torch.randn(3, 5, 9, 8)
    torch.testing.assert_close(traced(y), mixer(y), rtol=1e-4, atol=1e-5)


# torch.func


def test_functional_call(mixer):
    x = torch.randn(2, 5, 6, 7)
    mixer(x)
    doubled = {k: 2 * p for k, p in mixer.named_parameters()}
    twin = copy.deepcopy(mixer)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert torch.equal(functional_call(mixer, doubled, (x,)), twin(x))
    assert_right(mixer, x)


def test_functional_call_differentiates_to_the_new_parameters(mixer):
    x = torch.randn(2, 5, 6, 7)
    new = {k: p.detach().clone().requires_grad_() for k, p in mixer.named_parameters()}
    functional_call(mixer, new, (x,)).square().sum().backward()
    expected = all_gradients(mixer, x)
    assert_close({k: p.grad for k, p in new.items()}, {k: expected[k] for k in new})


@pytest.mark.parametrize("warm", [False, True])
def test_vmap(mixer, warm):
    x = torch.randn(3, 2, 5, 6, 7)
    expected = torch.stack([copy.deepcopy(mixer)(xi) for xi in x])
    if warm:
        mixer(x[0])
    torch.testing.assert_close(torch.vmap(mixer)(x), expected, rtol=1e-4, atol=1e-5)


def _parameters_and_buffers(mixer):
    return dict(mixer.named_parameters()), dict(mixer.named_buffers())


@pytest.mark.parametrize("warm", [False, True])
def test_func_grad(mixer, warm):
    x = torch.randn(2, 5, 6, 7)
    parameters, buffers = _parameters_and_buffers(mixer)
    expected = all_gradients(copy.deepcopy(mixer), x)
    if warm:
        mixer(x)

    def loss(p, x):
        return functional_call(mixer, (p, buffers), (x,)).square().sum()

    by_parameters, by_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    assert_close({"x": by_x, **by_parameters}, expected)


def test_gradients_of_each_sample(mixer):
    x = torch.randn(3, 5, 6, 7)
    parameters, buffers = _parameters_and_buffers(mixer)

    def loss(p, xi):
        return functional_call(mixer, (p, buffers), (xi[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = all_gradients(mixer, x[i : i + 1])
        assert_close({k: g[i] for k, g in found.items()}, {k: expected[k] for k in found}, 1e-4)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("how", ["func.jvp", "forward_ad"])
@pytest.mark.parametrize("warm", [False, True])
def test_forward_mode_is_right_or_refused(mixer, warm, how, needs_grad):
    """Never a tangent that is silently zero or missing."""
    mixer.requires_grad_(needs_grad)
    x, tangent = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7)
    _, expected = torch.func.jvp(plain_copy(mixer), (x.double(),), (tangent.double(),))
    if warm:
        mixer(x)
    try:
        if how == "func.jvp":
            _, found = torch.func.jvp(mixer, (x,), (tangent,))
        else:
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(mixer(forward_ad.make_dual(x, tangent))).tangent
    except (NotImplementedError, RuntimeError) as error:
        assert "forward" in str(error)  # noqa: PT017
        return
    assert found is not None
    assert_close({"": found}, {"": expected}, 1e-4)


# Tensors without values


def test_on_the_meta_device():
    mixer = FusedCATM(5).eval().to("meta")
    out = mixer(torch.empty(2, 5, 6, 7, device="meta"))
    assert out.shape == (2, 5, 6, 7)
    assert out.device.type == "meta"


def test_fake_tensors(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        mixer = FusedCATM(5, backend=backend).eval()
        x = torch.empty(2, 5, 6, 7).to(memory_format=torch.channels_last)
        assert mixer(x).stride() == x.stride()
