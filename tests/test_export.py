"""ONNX and Core ML files: content and exactness; a fused model is traced as plain formulas."""

import copy
import pathlib
import warnings

import pytest
import torch
from torch import nn

from casvit_kernels import AdditiveTokenMixer, FusedCATM, UnfusedWarning, benchmark, fuse, unfuse
from casvit_kernels.backends.cpu import CpuBackend
from casvit_kernels.export import ExportError, Normalization, prepare, to_coreml, to_onnx
from casvit_kernels.ops.mixer.cpu import CpuKernels


def fused_mixer(dim=8, **options):
    """In eval mode with statistics that are not the initial ones."""
    mixer = FusedCATM(dim, **options)
    for name in ("oper_q", "oper_k"):
        norm = getattr(mixer, name)[0].block[1]
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    return mixer.eval()


def reference(mixer, x):
    """Float64, through the plain module."""
    plain = AdditiveTokenMixer(mixer.qkv.in_channels).double().eval()
    plain.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        return plain(x.double())


# Tracers take the reference path by themselves


@pytest.fixture(params=[None, "cpu"])
def backend(request, monkeypatch):
    """The automatic choice, and the native kernel asked for by name; both would call the operator.

    Also where the kernel is not built: tracers need its schema alone.
    """
    monkeypatch.setattr(CpuBackend, "why_not", lambda self, problem=None: None)
    monkeypatch.setattr(CpuKernels, "pack", lambda self, w, eps, dtype: None)
    return request.param


def assert_plain(names):
    names = [str(name) for name in names]
    assert any("conv" in name.lower() for name in names), names
    assert not [name for name in names if "casvit" in name], names


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(backend, strict, training):
    mixer = fused_mixer(backend=backend).train(training)
    x = torch.randn(2, 8, 7, 9)
    expected = copy.deepcopy(mixer)(x) if training else reference(mixer, x)
    program = torch.export.export(mixer, (x,), strict=strict)
    assert_plain(node.target for node in program.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(program.module()(x).double(), expected.double())
    assert_plain(
        node.target
        for node in program.run_decompositions({}).graph.nodes
        if node.op == "call_function"
    )


def test_torch_export_with_dynamic_sizes():
    mixer = fused_mixer()
    dims = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height"),
        3: torch.export.Dim("width"),
    }
    program = torch.export.export(mixer, (torch.randn(2, 8, 7, 9),), dynamic_shapes=(dims,))
    x = torch.randn(3, 8, 5, 12)
    torch.testing.assert_close(program.module()(x).double(), reference(mixer, x))


def test_jit_trace(backend):
    mixer = fused_mixer(backend=backend)
    x = torch.randn(2, 8, 7, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(mixer, x, check_trace=False)
    assert_plain(node.kind() for node in traced.inlined_graph.nodes())
    y = torch.randn(3, 8, 5, 4)
    torch.testing.assert_close(traced(y).double(), reference(mixer, y))


@pytest.mark.parametrize("dynamo", [True, False])
def test_torch_onnx_export(backend, dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    mixer = fused_mixer(backend=backend)
    x = torch.randn(2, 8, 7, 9)
    path = tmp_path / "mixer.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(mixer, (x,), path, dynamo=dynamo, verbose=False, opset_version=18)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out).double(), reference(mixer, x))


@pytest.fixture
def onnx_extra():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


@pytest.fixture
def coreml_extra():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("coremltools")


# Arguments


@pytest.fixture(params=["onnx", "coreml"])
def export(request, tmp_path):
    """One of the two, with a path to write to, on a model that notices being run."""
    if request.param == "onnx":
        request.getfixturevalue("onnx_extra")
        function, suffix = to_onnx, ".onnx"
    else:
        request.getfixturevalue("coreml_extra")
        function, suffix = to_coreml, ".mlpackage"
    return function, tmp_path / f"m{suffix}"


class _Untouchable(nn.Module):
    def forward(self, x):
        raise AssertionError("computed")

    def __deepcopy__(self, memo):
        raise AssertionError("copied")


def test_an_existing_file_is_named_before_anything_is_computed(export):
    function, path = export
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=f"path: {path} exists already"):
        function(_Untouchable(), path)
    assert path.read_text() == "mine"


def test_a_missing_directory(export):
    function, path = export
    missing = path.parent / "missing" / path.name
    with pytest.raises(
        NotADirectoryError, match=r"path: expected an existing directory, got .*missing"
    ):
        function(_Untouchable(), missing)
    assert not missing.parent.exists()


def test_a_directory_that_cannot_be_written_to(export, monkeypatch):
    function, path = export

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.os, "mkdir", denied)  # file modes do not stop root
    with pytest.raises(PermissionError, match="path: cannot write into the directory"):
        function(_Untouchable(), path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_size": 0}, ValueError, r"input_size: expected a positive .* got 0"),
        ({"input_size": (3,)}, ValueError, r"input_size: .* got \(3,\)"),
        ({"input_size": 7.5}, ValueError, r"input_size: .* got 7\.5"),
        ({"input_size": True}, ValueError, r"input_size: .* got True"),
        ({"batch": 0}, ValueError, "batch: expected a positive integer, got 0"),
        ({"model": [1]}, TypeError, r"model: expected a torch\.nn\.Module, got list"),
        ({"model": nn.ReLU()}, ValueError, "pass example_input"),
        ({"model": FusedCATM(4).to("meta")}, ValueError, "model: .*meta device"),
        (
            {"model": nn.Sequential(nn.Conv2d(4, 4, 3)), "input_size": 2},
            ValueError,
            r"input_size: the model cannot compute an input of shape \(1, 4, 2, 2\)",
        ),
        ({"example_input": torch.ones(1, 4, 2, 2).int()}, TypeError, "example_input: expected"),
        ({"example_input": torch.ones(0, 4, 2, 2)}, ValueError, "example_input: expected"),
        ({"example_input": [1]}, TypeError, "example_input: expected"),
    ],
)
def test_bad_arguments(export, arguments, error, message):
    function, path = export
    options = {"model": FusedCATM(4), "input_size": 4, **arguments}
    with pytest.raises(error, match=message):
        function(options.pop("model"), path, **options)
    assert list(path.parent.iterdir()) == []


def test_wrong_suffix(export):
    function, path = export
    with pytest.raises(ValueError, match=f"path: expected a name that ends in {path.suffix}"):
        function(_Untouchable(), path.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("function", "name", "package"),
    [(to_onnx, "m.onnx", "onnx"), (to_coreml, "m.mlpackage", "coremltools")],
)
def test_a_missing_package_names_the_extra(function, name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'casvit-kernels\[export\]'"):
        function(FusedCATM(4), tmp_path / name)


# Models that are written otherwise than ours


class _ReturnsNothing(nn.Module):
    """As the backbones written for mmdetection and mmsegmentation: ``train`` returns None."""

    def __init__(self, dim=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 3, 1, 1), nn.BatchNorm2d(dim))
        self.mixer = fused_mixer(dim)
        nn.init.normal_(self.stem[1].running_mean)

    def forward(self, x):
        return self.mixer(self.stem(x))

    def train(self, mode=True):
        super().train(mode)


@pytest.mark.parametrize("training", [True, False])
def test_train_may_return_none(export, training):
    function, path = export
    model = _ReturnsNothing()
    model.train(training)
    report = function(model, path, 6)
    assert report.max_error is not None
    assert model.training is training


def test_train_may_return_none_where_channels_are_padded():
    pytest.importorskip("coremltools")
    from casvit_kernels.export.coreml.padding import padded

    class Mixer(AdditiveTokenMixer):
        def train(self, mode=True):
            super().train(mode)

    for dim in (8, 12):
        wide, report = padded(Mixer(dim))
        assert report.after == (-(-dim // 8) * 8,)
        assert not any(m.training for m in wide.modules())


def test_train_may_return_none_where_candidates_are_timed():
    model = _ReturnsNothing()
    unfuse(model)
    x = torch.randn(1, 3, 6, 6)
    candidates = benchmark.model_candidates(model, x, include=("eager", "fused"))
    assert all(call().shape == (1, 8, 6, 6) for call in candidates.values())


@torch.autocast("cpu", enabled=False)
def computed(path, x):
    """The outputs of an exported file."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    from casvit_kernels.export.mil import Program

    return Program(path)({"input": x})["output"]


def assert_exported(function, path, model, x):
    """The file computes what ``model`` does in eval mode; returns the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfusedWarning)  # only calls of the model itself may warn
        report = function(model, path, example_input=x, precision="fp32")
    alike = copy.deepcopy(model)
    alike.eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = alike(x)
    assert (computed(path, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    return report


def refusal(function, path, model, x):
    """Why the model is not exported; None where it is, and then the file computes the model."""
    try:
        assert_exported(function, path, model, x)
    except ExportError as error:
        assert list(path.parent.iterdir()) == []
        return str(error)
    return None


class _Residual(FusedCATM):
    def forward(self, x):
        return super().forward(x) + x


def residual():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), _Residual(8))
    net[1].load_state_dict(fused_mixer().state_dict())
    return net.eval()


def test_a_subclass_with_its_own_forward_is_exported_as_it_is_or_refused(export):
    function, path = export
    said = refusal(function, path, residual(), torch.randn(1, 3, 12, 12))
    assert said is None or said.startswith("output: 1 (_Residual) computes something else")


@pytest.mark.parametrize("verify", [True, False])
def test_a_copy_that_computes_something_else_is_refused(export, monkeypatch, verify):
    """Whatever it is that makes the copy differ: here its mixer lost the forward of a subclass."""
    function, path = export

    def lossy(model):
        copied = copy.deepcopy(model)
        plain = AdditiveTokenMixer(8)
        plain.load_state_dict(copied[1].state_dict())
        copied[1] = plain
        return copied

    monkeypatch.setattr(prepare, "plain_copy", lossy)
    with pytest.raises(
        ExportError, match=r"output: 1 \(_Residual\) computes something else than its copy .*differ"
    ):
        function(residual(), path, example_input=torch.randn(1, 3, 12, 12), verify=verify)
    assert list(path.parent.iterdir()) == []


def test_a_copy_that_is_slightly_off_is_refused(export, monkeypatch):
    function, path = export
    model = nn.Sequential(nn.Conv2d(3, 8, 1), fused_mixer()).eval()
    right = prepare.plain_copy

    def wrong(model):
        copied = right(model)
        copied[1].dwc.weight.data *= 1 + 1e-3
        return copied

    monkeypatch.setattr(prepare, "plain_copy", wrong)
    with pytest.raises(ExportError, match=r"output: 1 \(FusedCATM\) computes something else"):
        function(model, path, 8)


def test_hooks_that_change_the_result_are_exported(export):
    function, path = export
    model = nn.Sequential(nn.Conv2d(3, 8, 1), fused_mixer(), nn.ReLU()).eval()
    model[1].register_forward_hook(lambda m, args, out: 3 * out)
    model[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    model.register_forward_hook(lambda m, args, out: out - 2)
    assert_exported(function, path, model, torch.randn(1, 3, 6, 6))


def test_a_hook_that_runs_in_the_copy_alone_is_refused_or_exported(export):
    """A fused mixer does not run the hooks of children without weights."""
    function, path = export
    model = nn.Sequential(nn.Conv2d(3, 8, 1), fused_mixer()).eval()
    model[1].oper_q[0].block[4].register_forward_hook(lambda m, args, out: 0.5 * out)
    said = refusal(function, path, model, torch.randn(1, 3, 6, 6))
    assert said is None or said.startswith("output: 1 (FusedCATM) computes something else")


class _Merging(nn.Module):
    """A branch that eval() merges into the weights and train() takes out again, as LoRA layers do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.mixer = fused_mixer()
        self.branch = nn.Parameter(torch.randn(8, 3, 1, 1))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.conv.weight.data += self.branch.data * (-1 if mode else 1)
            self.merged = not mode

    def forward(self, x):
        weight = self.conv.weight if self.merged else self.conv.weight + self.branch
        return self.mixer(nn.functional.conv2d(x, weight, self.conv.bias)) * (2 - self.training)


@pytest.mark.parametrize("training", [True, False])
def test_a_train_method_that_changes_the_result(export, training):
    function, path = export
    model = _Merging()
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_exported(function, path, model, torch.randn(1, 3, 6, 6))
    assert model.training is training
    assert model.merged is not training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_any_dtype_are_held_to_their_copy(export, dtype):
    function, path = export
    model = nn.Sequential(nn.Conv2d(3, 8, 1), fused_mixer()).to(dtype)
    report = function(model, path, 6, precision="fp32")
    expected = copy.deepcopy(model).float().eval()(torch.ones(1, 3, 6, 6))
    torch.testing.assert_close(computed(path, torch.ones(1, 3, 6, 6)), expected)
    assert any("float32 copy" in note for note in report.notes)


def test_a_model_for_kernels_of_another_machine(export):
    function, path = export
    model = fused_mixer(backend="cuda")
    report = function(model, path, example_input=torch.randn(1, 8, 6, 6), precision="fp32")
    assert any("its kernels cannot run here: " in note for note in report.notes)
    assert model.backend == "cuda"


def test_normalisation_inside_is_no_difference(export):
    function, path = export
    model = nn.Sequential(nn.Conv2d(3, 8, 1), fused_mixer()).eval()
    function(model, path, 8, normalize=Normalization(top=255.0))


def test_autocast_of_the_caller_is_no_difference(export):
    function, path = export
    model = nn.Sequential(nn.Conv2d(3, 8, 1), fused_mixer()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert_exported(function, path, model, torch.randn(1, 3, 6, 6))


class _Adapter(nn.Module):
    """A low-rank branch beside a convolution, as peft puts it there."""

    def __init__(self, base):
        super().__init__()
        self.base, channels = base, base.in_channels
        self.a = nn.Conv2d(channels, 4, 1, bias=False)
        self.b = nn.Conv2d(4, base.out_channels, 1, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class _Wrapper(nn.Module):
    """Without the attributes of what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("child", "wrapper"),
    [("qkv", _Adapter), ("proj", _Wrapper), ("oper_q", _Wrapper), ("proj_drop", _Wrapper)],
)
def test_children_that_are_no_published_ones(export, child, wrapper, fused):
    """Put there after fuse: the file computes what they say, or there is none."""
    function, path = export
    plain = AdditiveTokenMixer(8)
    plain.load_state_dict(fused_mixer().state_dict())
    model = nn.Sequential(nn.Conv2d(3, 8, 1), plain).eval()
    if fused:
        fuse(model)
    setattr(model[1], child, wrapper(getattr(model[1], child)))
    said = refusal(function, path, model, torch.randn(1, 3, 6, 6))
    if fused:
        assert said is None or "computes something else" in said or "cannot compute" in said
    else:
        assert said is None


@pytest.mark.parametrize("verify", [True, False])
def test_channels_of_an_adapted_model_are_not_padded(tmp_path, verify):
    """A padded network is built from the state dict: hooks and other children would be lost."""
    pytest.importorskip("coremltools")
    path = tmp_path / "m.mlpackage"
    options = {"pad_channels": True, "example_input": torch.randn(1, 12, 6, 6), "verify": verify}
    mixer = fused_mixer(12)
    mixer.register_forward_hook(lambda m, args, out: 2 * out)
    with pytest.raises(
        ExportError, match=r"output: .* with padded channels it is another function"
    ):
        to_coreml(mixer, path, **options)
    mixer = AdditiveTokenMixer(12).eval()
    mixer.qkv = _Adapter(mixer.qkv)
    with pytest.raises(ValueError, match=r"pad_channels: .*whose qkv is a _Adapter"):
        to_coreml(mixer, path, **options)
    assert list(tmp_path.iterdir()) == []
