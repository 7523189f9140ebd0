"""A call like the last one goes straight to the operator; any other gives what the long way gives."""

import copy
import gc
import pickle
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from conftest import require_backend
from mixers import filled
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from casvit_kernels import AdditiveTokenMixer, FusedCATM, UnfusedWarning, fuse, module, use_backend
from casvit_kernels.backends import ENVIRONMENT
from casvit_kernels.ops.mixer import cpu

PARTS = [
    "qkv",
    "dwc",
    "proj",
    *(f"oper_{z}.{part}" for z in "qk" for part in ("0.block.0", "0.block.1", "0.block.3")),
    *(f"oper_{z}.1.block.1" for z in "qk"),
]
NORM = "oper_k.0.block.1"


@pytest.fixture
def x():
    return torch.randn(2, 8, 6, 5) + 0.3


@pytest.fixture
def mixer(x):
    """One that has been called and whose next call is short."""
    require_backend("cpu")
    mixer = filled(FusedCATM(8, True, 0.5)).eval()
    with torch.no_grad():
        mixer(x)
        assert way(mixer, x) == "short"
    return mixer


def way(mixer, *inputs):
    """Which way a call goes; it must not raise."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        real = module.check
        patch.setattr(module, "check", lambda *a: seen.append(1) or real(*a))
        mixer(*inputs)
    return "long" if seen else "short"


def outcome(call):
    """What the call returns, or its error."""
    torch.manual_seed(7)  # of dropout
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # vmap warns of operators it cannot batch
        warnings.simplefilter("ignore", UnfusedWarning)
        try:
            return call()
        except Exception as error:
            return type(error), str(error)


def outcomes(mixer, call):
    """Those of `call(mixer)` now, and of a copy's that knows no short way and has packed nothing."""
    fresh = copy.deepcopy(mixer)
    found = outcome(lambda: call(mixer))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fast_path", lambda *_: None)
        expected = outcome(lambda: call(fresh))
    return found, expected


def assert_as_fresh(mixer, call):
    found, expected = outcomes(mixer, call)
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected
    return found


def assert_same_the_long_way(call):
    """The same call with the same packed weights; for what leaves those as they are."""
    found = call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fast_path", lambda *_: None)
        assert call() == found
    return found


# The short way


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_repeated_call_is_short(x, mode):
    require_backend("cpu")
    mixer = filled(FusedCATM(8, True)).eval()
    with mode():
        expected = mixer(x)
        assert way(mixer, x) == "short"
        assert torch.equal(mixer(x), expected)


@pytest.mark.parametrize("shape", [(1, 8, 6, 5), (5, 8, 1, 1), (2, 8, 14, 3)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_other_sizes_and_layouts_are_short(mixer, shape, layout):
    x = torch.randn(shape).contiguous(memory_format=layout)
    with torch.no_grad():
        assert way(mixer, x) == way(mixer, x.transpose(2, 3)) == way(mixer, x[:, :, ::2]) == "short"
        out = assert_as_fresh(mixer, lambda m: m(x))
    assert out.is_contiguous(memory_format=layout)


@torch.no_grad()
def test_what_else_is_short(mixer, x, monkeypatch):
    assert way(mixer, x.clone().requires_grad_()) == "short"
    with use_backend("cpu"):
        assert way(mixer, x) == "short"
        with use_backend(None):
            assert way(mixer, x) == "short"
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    assert way(mixer, x) == "short"
    monkeypatch.setenv(ENVIRONMENT, "")
    assert way(mixer, x) == "short"
    mixer.backend = "cpu"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert way(mixer, x) == "short"
    mixer.train().eval()
    assert way(mixer, x) == "short"
    mixer.to(torch.float16)
    mixer(x.half())
    assert way(mixer, x.half()) == "short"


@torch.no_grad()
def test_after_other_calls_it_is_short_again(mixer, x):
    for norm in (mixer.oper_q[0].block[1], mixer.oper_k[0].block[1]):
        norm.eps = 1e-3
    mixer(x)
    assert way(mixer, x) == "short"
    with torch.autocast("cpu"), torch.enable_grad():
        mixer(x)
    assert way(mixer, x) == "short"
    mixer.qkv.weight.mul_(2)
    assert way(mixer, x) == "long"
    assert way(mixer, x) == "short"
    plain = nn.Sequential(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(mixer)))
    plain(x)
    assert way(plain, x) == "short"


@torch.no_grad()
def test_a_fused_mixer_and_a_subclass_are_short(mixer, x):
    class Twice(FusedCATM):
        def forward(self, x):
            return super().forward(super().forward(x))

    model = nn.Sequential(filled(AdditiveTokenMixer(8))).eval()
    fuse(model)
    for other in (model, filled(Twice(8)).eval()):
        other(x)
        assert way(other, x) == "short"
        assert_as_fresh(other, lambda m: m(x))


# What changes a mixer. Each changes the output.


def _written(mixer, part):
    for t in _tensors(mixer.get_submodule(part)):
        t.mul_(1.5).add_(0.1)


def _data_moved(mixer, part):
    for t in _tensors(mixer.get_submodule(part)):
        t.data = 1.5 * t.data + 0.1


def _data_written(mixer, part):
    for t in _tensors(mixer.get_submodule(part)):
        t.data.mul_(1.5).add_(0.1)


def _replaced(mixer, part):
    owner, _, name = part.rpartition(".")
    mixer.get_submodule(owner)._modules[name] = _other().get_submodule(part)


def _tensors_replaced(mixer, part):
    child, other = mixer.get_submodule(part), _other().get_submodule(part)
    child._parameters.update(other._parameters)
    child._buffers.update(other._buffers)


def _dictionaries_replaced(mixer, part):
    other = _other().get_submodule(part)
    mixer.get_submodule(part).__setstate__(other.__dict__)


def _parametrized(mixer, part):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(mixer.get_submodule(part), "weight", Double())


def _pruned(mixer, part):
    child = mixer.get_submodule(part)
    prune.custom_from_mask(
        child, "weight", torch.arange(child.weight.numel()).view_as(child.weight) % 2
    )


def _pruned_without_its_hook(mixer, part):
    _pruned(mixer, part)
    mixer.get_submodule(part)._forward_pre_hooks.clear()


def _swapped(mixer, part):
    child, other = mixer.get_submodule(part), _other().get_submodule(part)
    torch.utils.swap_tensors(child.weight, other.weight)


def _other():
    return filled(FusedCATM(8, True), 9).eval()


def _tensors(child):
    buffers = [b for b in child._buffers.values() if b.is_floating_point()]
    return [p for p in child._parameters.values() if p is not None] + buffers


PART_CHANGES = [
    _written,
    _data_moved,
    _data_written,
    _replaced,
    _tensors_replaced,
    _dictionaries_replaced,
    _parametrized,
    _pruned,
    _pruned_without_its_hook,
    _swapped,
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", PART_CHANGES)
@torch.no_grad()
def test_a_changed_part_is_seen(mixer, x, change, part):
    before = mixer(x)
    change(mixer, part)
    for _ in range(3):
        found = assert_as_fresh(mixer, lambda m: m(x))
        assert not torch.equal(found, before)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_run(mixer, x, register, part):
    seen = []
    handle = getattr(mixer.get_submodule(part), register)(lambda *_: seen.append(1))
    mixer(x)
    mixer(x)
    assert seen == [1, 1]
    handle.remove()
    assert way(mixer, x) == "short"
    # Also those of a dictionary that was put in another's place
    name = register.removeprefix("register") + "s"
    mixer.get_submodule(part).__dict__[name] = OrderedDict({0: lambda *_: seen.append(2)})
    mixer(x)
    assert seen == [1, 1, 2]


def _load(mixer):
    mixer.load_state_dict(_other().state_dict())


def _assign(mixer):
    mixer.load_state_dict(_other().state_dict(), assign=True)


def _children_replaced(mixer):
    mixer._modules = _other()._modules


def _grandchildren_replaced(mixer):
    mixer.oper_q[0].block._modules = _other().oper_q[0].block._modules


def _part_of_a_gate_replaced(mixer):
    mixer.oper_q[1] = _other().oper_q[1]


def _training(mixer):
    mixer.train()


def _norm_training(name):
    def change(mixer):
        getattr(mixer, name)[0].block[1].train()

    return change


def _dropout(mixer):
    mixer.proj_drop.train()


def _eps(name):
    def change(mixer):
        getattr(mixer, name)[0].block[1].eps = 0.5

    return change


def _no_statistics(mixer):
    norm = mixer.get_submodule(NORM)
    norm.running_mean = norm.running_var = None


def _turned(mixer):
    weight = mixer.oper_k[1].block[1].weight  # at the same address
    weight.data = weight.data.transpose(0, 1)


def _wide(mixer):
    mixer.to(torch.float64)


def _smaller(mixer):
    mixer.qkv.weight.data = mixer.qkv.weight.data[
        :21, :7
    ]  # at the same address, with the same strides


def _fewer_rows(mixer):
    mixer.qkv.weight.data = mixer.qkv.weight.data[:21]


def _of_three_dimensions(mixer):
    mixer.qkv.weight.data = mixer.qkv.weight.data[:, :, 0]


def _missing(name):
    def change(mixer):
        setattr(mixer, name, None)

    return change


def _no_bias(mixer):
    del mixer.dwc.bias


def _one_weight_of_another_dtype(mixer):
    mixer.proj.half()


def _one_weight_elsewhere(mixer):
    mixer.proj.to("meta")


def _refreshed(mixer):
    mixer.dwc.weight.data = mixer.dwc.weight.data + 1
    mixer.refresh()


CHANGES = {
    "load_state_dict": _load,
    "load_state_dict assign": _assign,
    "children replaced": _children_replaced,
    "grandchildren replaced": _grandchildren_replaced,
    "part of a gate replaced": _part_of_a_gate_replaced,
    "train": _training,
    "norm of q in training": _norm_training("oper_q"),
    "norm of k in training": _norm_training("oper_k"),
    "dropout": _dropout,
    "eps of q": _eps("oper_q"),
    "eps of k": _eps("oper_k"),
    "no statistics": _no_statistics,
    "turned": _turned,
    "float64": _wide,
    "qkv smaller": _smaller,
    "qkv of fewer rows": _fewer_rows,
    "qkv of three dimensions": _of_three_dimensions,
    "no dwc": _missing("dwc"),
    "no dropout": _missing("proj_drop"),
    "no bias": _no_bias,
    "mixed dtypes": _one_weight_of_another_dtype,
    "mixed devices": _one_weight_elsewhere,
    "refresh": _refreshed,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_is_seen(mixer, x, change):
    before = mixer(x)
    change(mixer)
    found = assert_as_fresh(mixer, lambda m: m(x))
    assert isinstance(found, tuple) or not torch.equal(found, before)


@torch.no_grad()
def test_a_bias_of_qkv_that_comes_and_goes(x):
    require_backend("cpu")
    mixer = filled(FusedCATM(8, False)).eval()
    mixer(x)
    for bias in (nn.Parameter(torch.randn(24)), None):
        mixer.qkv.bias = bias
        assert_as_fresh(mixer, lambda m: m(x))
        assert way(mixer, x) == "short"
    del mixer.qkv.bias
    assert isinstance(assert_as_fresh(mixer, lambda m: m(x)), tuple)


@torch.no_grad()
def test_what_the_kernel_calls_stale_is_packed_again(mixer, x, monkeypatch):
    packed = []
    real = cpu.schema.pack
    monkeypatch.setattr(cpu.schema, "pack", lambda *args: packed.append(1) or real(*args))
    mixer.dwc.weight.data.mul_(1.5)
    for _ in range(4):
        mixer(x)
    assert len(packed) == 1


# What chooses another backend


@torch.no_grad()
def test_another_backend_serves_where_it_is_asked_for(mixer, x, monkeypatch):
    def asked():
        assert way(mixer, x) == "long"
        assert_as_fresh(mixer, lambda m: m(x))

    mixer.backend = "reference"
    asked()
    mixer.backend = None
    assert way(mixer, x) == "short"
    with use_backend("reference"):
        asked()
    assert way(mixer, x) == "short"
    with monkeypatch.context() as patch:
        patch.setenv(ENVIRONMENT, "reference")
        asked()
        patch.setattr("os.environ", {ENVIRONMENT: "reference"})
        asked()
    assert way(mixer, x) == "short"
    for wrong in ("", "cuda", "nonsense"):
        mixer.backend = wrong
        assert isinstance(assert_as_fresh(mixer, lambda m: m(x)), tuple)
    mixer.backend = None
    monkeypatch.setenv(ENVIRONMENT, "nonsense")
    assert isinstance(assert_as_fresh(mixer, lambda m: m(x)), tuple)


# Other inputs


INPUTS = {
    "other channels": lambda: torch.randn(2, 7, 6, 5),
    "three dimensions": lambda: torch.randn(8, 6, 5),
    "five dimensions": lambda: torch.randn(1, 8, 6, 5, 1),
    "no pixels": lambda: torch.randn(1, 8, 0, 5),
    "no images": lambda: torch.randn(0, 8, 6, 5),
    "no images of another number of channels": lambda: torch.randn(0, 7, 6, 5),
    "float64": lambda: torch.randn(2, 8, 6, 5).double(),
    "bfloat16": lambda: torch.randn(2, 8, 6, 5).bfloat16(),
    "integers": lambda: torch.ones(2, 8, 6, 5, dtype=torch.int32),
    "complex": lambda: torch.ones(2, 8, 6, 5, dtype=torch.complex64),
    "no tensor": lambda: [[1.0]],
    "None": lambda: None,
    "meta": lambda: torch.randn(2, 8, 6, 5, device="meta"),
    "sparse": lambda: torch.ones(2, 8, 6, 5).to_sparse(),
    "negative": lambda: torch._neg_view(torch.ones(2, 8, 6, 5)),
    "parameter": lambda: nn.Parameter(torch.ones(2, 8, 6, 5)),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@torch.no_grad()
def test_another_input(mixer, make):
    other = make()
    assert_as_fresh(mixer, lambda m: m(other))


@torch.no_grad()
def test_a_tensor_of_another_class_sees_the_same(mixer, x):
    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    def call():
        seen.clear()
        return type(mixer(x.as_subclass(Watching))), list(seen)

    seen = []
    assert_same_the_long_way(call)


@torch.no_grad()
def test_weights_packed_for_autocast_do_not_serve_without(mixer, x):
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x)
    assert isinstance(assert_as_fresh(mixer, lambda m: m(x.bfloat16())), tuple)
    mixer.bfloat16().proj.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x.bfloat16())
    assert isinstance(assert_as_fresh(mixer, lambda m: m(x.bfloat16())), tuple)


# Who else looks on


def test_gradients_arrive(mixer, x):
    x.requires_grad_()
    mixer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in mixer.parameters())


@torch.no_grad()
def test_autocast(mixer, x):
    with torch.autocast("cpu", torch.bfloat16):
        assert assert_as_fresh(mixer, lambda m: m(x)).dtype is torch.bfloat16


def seen_by(mode, method, mixer, x):
    """A call of the mixer under a mode; it returns the functions that the mode saw."""

    def note(self, function, types, args=(), kwargs=None):
        seen.append(str(function))
        return function(*args, **(kwargs or {}))

    def call():
        seen.clear()
        with type("Mode", (mode,), {method: note})():
            mixer(x)
        return list(seen)

    seen = []
    return call


@torch.no_grad()
def test_a_dispatch_mode_sees_the_same(mixer, x):
    call = seen_by(TorchDispatchMode, "__torch_dispatch__", mixer, x)
    assert "casvit_kernels.project_and_mix.default" in assert_same_the_long_way(call)


@torch.no_grad()
def test_a_function_mode_sees_the_same(mixer, x):
    assert_same_the_long_way(seen_by(TorchFunctionMode, "__torch_function__", mixer, x))


@torch.no_grad()
def test_a_trace_holds_plain_operations(mixer, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        graph = str(torch.jit.trace(mixer, x, check_trace=False).inlined_graph)
    assert "aten::_convolution" in graph
    assert "casvit_kernels::" not in graph
    assert "aten::numel" not in graph


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_holds_plain_operations(mixer, x, strict):
    graph = str(torch.export.export(mixer, (x,), strict=strict).graph)
    assert "conv2d" in graph
    assert "casvit" not in graph


@torch.no_grad()
def test_compiled_once_and_whole(mixer, x):
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.equal(compiled(x), mixer(x))
        assert way(mixer, x) == "short"
        mixer.proj.weight.mul_(2)
    assert counter.frame_count == 1
    assert any("project_and_mix" in str(g.graph) for g in counter.graphs)


@torch.no_grad()
def test_vmap(mixer, x):
    many = torch.stack([x, 2 * x])
    assert_as_fresh(mixer, lambda m: torch.func.vmap(m)(many))


@torch.no_grad()
def test_transforms_that_differentiate(mixer, x):
    found, expected = outcomes(mixer, lambda m: torch.func.jvp(m, (x,), (x,)))
    torch.testing.assert_close(found, expected)
    found, expected = outcomes(mixer, lambda m: torch.func.grad(lambda x: m(x).sum())(x))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_forward_mode(mixer, x):
    def tangent(m):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(m(forward_ad.make_dual(x, x))).tangent

    assert assert_as_fresh(mixer, tangent) is not None


@torch.no_grad()
def test_functional_call(mixer, x):
    before = mixer(x)
    other = {"dwc.weight": 2 * mixer.dwc.weight}
    assert_as_fresh(mixer, lambda m: torch.func.functional_call(m, other, x))
    assert torch.equal(mixer(x), before)


@torch.no_grad()
def test_weights_live_while_the_kernel_reads_them(mixer, x, monkeypatch):
    expected = mixer(x)
    weight = weakref.ref(mixer.qkv.weight)
    real = module.infer

    def meanwhile(*arguments):
        monkeypatch.undo()
        mixer.qkv.weight = nn.Parameter(2 * mixer.qkv.weight)  # another thread
        mixer(x)
        gc.collect()
        assert weight() is not None
        return real(*arguments)

    monkeypatch.setattr(module, "infer", meanwhile)
    assert torch.equal(mixer(x), expected)
    assert weight() is None


# Copies


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_goes_its_own_way(mixer, x, make):
    twin = make(mixer)
    before = mixer(x)
    assert torch.equal(twin(x), before)
    twin.dwc = copy.deepcopy(twin.dwc)
    twin.dwc.weight.mul_(2)
    assert_as_fresh(twin, lambda m: m(x))
    assert_as_fresh(mixer, lambda m: m(x))


@torch.no_grad()
def test_a_replica_with_weights_of_its_own(mixer, x):
    """As DataParallel makes them: the dictionary copied, weights as plain attributes."""
    replica = mixer._replicate_for_data_parallel()
    for name, child in mixer._modules.items():
        replica._modules[name] = copy.deepcopy(child)
    replica._modules["dwc"] = dwc = mixer.dwc._replicate_for_data_parallel()
    dwc.weight, dwc.bias = 2 * mixer.dwc.weight, mixer.dwc.bias.clone()
    assert not torch.equal(replica(x), mixer(x))
    assert_as_fresh(mixer, lambda m: m(x))
