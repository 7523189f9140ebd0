"""ONNX and Core ML files: content and exactness; a fused model is traced as plain formulas."""

import copy
import pathlib
import warnings

import published_mixer
import pytest
import torch
from mixers import filled
from torch import nn

from casvit_kernels import AdditiveTokenMixer, FusedCATM, fuse
from casvit_kernels.backends.cpu import CpuBackend
from casvit_kernels.export import ExportError, to_coreml, to_onnx
from casvit_kernels.export import onnx as onnx_module
from casvit_kernels.models import Config, RCViT


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
    monkeypatch.setattr(CpuBackend, "pack", lambda self, w, eps, dtype: None)
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


# to_onnx


@pytest.fixture
def onnx_extra():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def run_onnx(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {"input": x.numpy()})]


@pytest.mark.parametrize("kind", ["plain", "fused", "user's", "user's fused"])
def test_to_onnx(onnx_extra, tmp_path, kind, capfd):
    model = filled(
        published_mixer.Net(
            {"plain": AdditiveTokenMixer, "fused": FusedCATM}.get(
                kind, published_mixer.RewrittenMixer
            )
        )
    ).eval()
    if kind == "user's fused":
        fuse(model)
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    report = to_onnx(model, tmp_path / "net.onnx", input_size=(12, 9), batch=2)
    assert capfd.readouterr() == ("", "")
    assert report.path == tmp_path / "net.onnx"
    assert report.format == "onnx"
    assert report.bytes == report.path.stat().st_size
    assert 0 <= report.mean_error <= report.max_error < 1e-5
    assert "6 norms folded, 0 left" in report.notes[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    x = torch.randn(2, 3, 12, 9)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(report.path, x)[0], model(x))


def test_to_onnx_of_a_model_in_training(onnx_extra, tmp_path):
    model = filled(published_mixer.Net(FusedCATM, proj_drop=0.5)).bfloat16().train()
    report = to_onnx(model, str(tmp_path / "net.onnx"), input_size=8)
    assert all(m.training for m in model.modules())
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert "left in training mode" in report.notes[0]
    assert "bfloat16" in report.notes[1]
    assert "net.onnx" in str(report)
    assert "max" in str(report)
    x = torch.randn(1, 3, 8, 8)
    expected = copy.deepcopy(model).eval().double()(x.double())
    torch.testing.assert_close(run_onnx(report.path, x)[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_to_onnx_of_a_single_mixer_with_any_batch(onnx_extra, tmp_path):
    mixer = fused_mixer()
    report = to_onnx(
        mixer, tmp_path / "mixer.onnx", input_size=(5, 7), dynamic_batch=True, opset=20
    )
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8, 5, 7)
        torch.testing.assert_close(run_onnx(report.path, x)[0].double(), reference(mixer, x))


def test_to_onnx_takes_the_shape_of_an_example(onnx_extra, tmp_path):
    mixer = fused_mixer()
    report = to_onnx(mixer, tmp_path / "m.onnx", example_input=torch.randn(3, 8, 4, 6).double())
    (out,) = run_onnx(report.path, torch.randn(3, 8, 4, 6))
    assert out.shape == (3, 8, 4, 6)


class _Pyramid(nn.Module):
    """Several outputs, like a detection backbone."""

    def __init__(self):
        super().__init__()
        self.low = FusedCATM(4)
        self.down = nn.Conv2d(4, 6, 3, 2, 1)
        self.high = FusedCATM(6)

    def forward(self, x):
        low = self.low(x)
        return [low, {"high": self.high(self.down(low))}]


def test_to_onnx_of_several_outputs(onnx_extra, tmp_path):
    import onnx

    model = filled(_Pyramid())
    report = to_onnx(model, tmp_path / "p.onnx", input_size=9)
    graph = onnx.load(report.path).graph
    assert [v.name for v in graph.input] == ["input"]
    assert [v.name for v in graph.output] == ["output0", "output1"]
    x = torch.randn(1, 4, 9, 9)
    low, high = run_onnx(report.path, x)
    model.eval()
    torch.testing.assert_close(low, model(x)[0])
    torch.testing.assert_close(high, model(x)[1]["high"])


@pytest.mark.parametrize("fork_feat", [False, True])
def test_to_onnx_of_the_model_family(onnx_extra, tmp_path, fork_feat):
    config = Config(
        layers=(1, 1, 1, 1), dims=(4, 4, 8, 8)
    )  # the sizes of the family take 15 s each
    model = filled(RCViT(config, num_classes=5, fork_feat=fork_feat, fused=True))
    report = to_onnx(model, tmp_path / "model.onnx", input_size=32)
    x = torch.randn(1, 3, 32, 32)
    expected = model.eval()(x)
    expected = list(expected) if fork_feat else [expected]
    outputs = run_onnx(report.path, x)
    assert len(outputs) == len(expected)
    for got, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_wrong_file_is_not_kept(onnx_extra, tmp_path, monkeypatch):
    write = onnx_module._write

    def write_another(prepared, *arguments):
        wrong = copy.deepcopy(prepared)
        wrong.exported.model.dwc.weight.data[0] += 1e-3
        write(wrong, *arguments)

    monkeypatch.setattr(onnx_module, "_write", write_another)
    (tmp_path / "m.onnx").write_text("earlier")
    with pytest.raises(ExportError, match=r"output: the exported file differs .* expected at most"):
        to_onnx(fused_mixer(), tmp_path / "m.onnx", input_size=5, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "earlier"


def test_an_interrupted_export_leaves_nothing(onnx_extra, tmp_path, monkeypatch):
    def interrupted(prepared, draft, *arguments):
        draft.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(fused_mixer(), tmp_path / "m.onnx", input_size=5)
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("opset", [17, 999, True, "18"])
def test_bad_opset(onnx_extra, tmp_path, opset):
    with pytest.raises(ValueError, match="opset: expected an integer from 18"):
        to_onnx(_Untouchable(), tmp_path / "m.onnx", opset=opset)


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
    with pytest.raises(ImportError, match=rf"{package}: pip install casvit-kernels\[export\]"):
        function(FusedCATM(4), tmp_path / name)
