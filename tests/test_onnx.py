"""`to_onnx`: what is in the file, how exact it is, and that nothing wrong is kept."""

import copy

import numpy
import published_mixer
import pytest
import torch
from mixers import filled
from test_export import fused_mixer, reference
from test_folding import statistics
from torch import nn

from casvit_kernels import AdditiveTokenMixer, FusedCATM, fuse, photographs
from casvit_kernels.export import ExportError, Normalization, UntrainedWeights, to_onnx
from casvit_kernels.export.onnx import newest_opset, quantize, verify, write
from casvit_kernels.export.prepare import prepare
from casvit_kernels.models import Config, RCViT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

CONFIG = Config((1, 1, 1, 1), (8, 8, 16, 16))  # the sizes of the family take 15 s each


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {"input": x.numpy()})]


@pytest.mark.parametrize("kind", ["plain", "fused", "user's", "user's fused"])
def test_to_onnx(tmp_path, kind, capfd):
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
    assert "6 norms folded, 0 left as they are" in report.notes
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    x = torch.randn(2, 3, 12, 9)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(report.path, x)[0], model(x))


def test_to_onnx_of_a_model_in_training(tmp_path):
    model = filled(published_mixer.Net(FusedCATM, proj_drop=0.5)).bfloat16().train()
    report = to_onnx(model, str(tmp_path / "net.onnx"), input_size=8)
    assert all(m.training for m in model.modules())
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert "left in training mode" in " ".join(report.notes)
    assert "bfloat16" in " ".join(report.notes)
    assert "net.onnx" in str(report)
    assert "max" in str(report)
    x = torch.randn(1, 3, 8, 8)
    expected = copy.deepcopy(model).eval().double()(x.double())
    torch.testing.assert_close(run_onnx(report.path, x)[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_to_onnx_of_a_single_mixer_with_any_batch(tmp_path):
    mixer = fused_mixer()
    report = to_onnx(mixer, tmp_path / "mixer.onnx", input_size=(5, 7), batch="dynamic", opset=21)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8, 5, 7)
        torch.testing.assert_close(run_onnx(report.path, x)[0].double(), reference(mixer, x))


def test_to_onnx_takes_the_shape_of_an_example(tmp_path):
    mixer = fused_mixer()
    report = to_onnx(mixer, tmp_path / "m.onnx", example_input=torch.randn(3, 8, 4, 6).double())
    (out,) = run_onnx(report.path, torch.randn(3, 8, 4, 6))
    assert out.shape == (3, 8, 4, 6)


class Pyramid(nn.Module):
    """Several outputs, like a detection backbone."""

    def __init__(self):
        super().__init__()
        self.low = FusedCATM(4)
        self.down = nn.Conv2d(4, 6, 3, 2, 1)
        self.high = FusedCATM(6)

    def forward(self, x):
        low = self.low(x)
        return [low, {"high": self.high(self.down(low))}]


def test_to_onnx_of_several_outputs(tmp_path):
    model = filled(Pyramid())
    report = to_onnx(model, tmp_path / "p.onnx", input_size=9)
    graph = onnx.load(report.path).graph
    assert [v.name for v in graph.input] == ["input"]
    assert [v.name for v in graph.output] == ["output0", "output1"]
    x = torch.randn(1, 4, 9, 9)
    low, high = run_onnx(report.path, x)
    model.eval()
    torch.testing.assert_close(low, model(x)[0])
    torch.testing.assert_close(high, model(x)[1]["high"])


def classifier(**options):
    return statistics(RCViT(CONFIG, num_classes=5, **options)).eval()


def expected(model, x):
    with torch.no_grad():
        out = copy.deepcopy(model).eval().double()(x.double())
    return list(out) if isinstance(out, (list, tuple)) else [out]


def assert_near(path, model, x, tolerance=1e-5):
    """Of the largest value of each output."""
    got, wanted = run_onnx(path, x), expected(model, x)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.long
@pytest.mark.parametrize("opset", range(17, newest_opset() + 1))
def test_opsets(tmp_path, opset):
    model = classifier(fused=True)
    report = to_onnx(model, tmp_path / "m.onnx", 64, opset=opset, batch="dynamic")
    written = onnx.load(report.path)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", opset)]
    assert f"fp32, opset {opset}" in report.notes
    assert_near(report.path, model, torch.randn(3, 3, 64, 64))


def test_any_batch_and_size(tmp_path):
    model = classifier()
    report = to_onnx(
        model, tmp_path / "m.onnx", (40, 48), batch="dynamic", dynamic_size=True, opset=17
    )
    (given,) = onnx.load(report.path).graph.input
    dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    for shape in ((1, 3, 40, 48), (4, 3, 97, 64), (2, 3, 33, 130)):
        assert_near(report.path, model, torch.randn(shape))


def test_a_dense_backbone_has_named_outputs(tmp_path):
    model = classifier(fork_feat=True, fused=True)
    report = to_onnx(model, tmp_path / "m.onnx", 64, dynamic_size=True)
    outputs = onnx.load(report.path).graph.output
    assert [o.name for o in outputs] == ["stage1", "stage2", "stage3", "stage4"]
    assert report.top1 is None
    assert_near(report.path, model, torch.randn(1, 3, 96, 70))


@pytest.mark.long
def test_folded_and_simplified(tmp_path):
    model = classifier()
    plain = to_onnx(model, tmp_path / "plain.onnx", 64, fold=False, verify=False)
    folded = to_onnx(model, tmp_path / "folded.onnx", 64)
    assert "26 norms folded" in " ".join(folded.notes)
    assert "not checked" in plain.notes[-1]
    assert plain.max_error is None
    for path in (plain.path, folded.path):
        assert "Split" not in operators(path)  # qkv is three convolutions
        assert operators(path).count("Gemm") == 1  # the two heads are one
        assert_near(path, model, torch.randn(1, 3, 64, 64))
    before_mixers = 4  # norm1 of each stage
    assert operators(folded.path).count("BatchNormalization") == 0
    assert len(operators(folded.path)) <= len(operators(plain.path)) - before_mixers


@pytest.mark.long
def test_gelu_is_one_operator_in_onnx_runtime(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    report = to_onnx(classifier(), tmp_path / "m.onnx", 64, opset=17, verify=False)
    onnxruntime.InferenceSession(report.path, options, providers=["CPUExecutionProvider"])
    assert "Erf" in operators(report.path)
    assert "Erf" not in operators(tmp_path / "optimised.onnx")


def test_no_path_of_this_machine_is_in_the_file(tmp_path):
    report = to_onnx(classifier(), tmp_path / "m.onnx", 64, verify=False)
    assert b"site-packages" not in report.path.read_bytes()
    assert b".py" not in report.path.read_bytes()


def test_a_file_that_appears_during_the_export_is_kept(tmp_path, monkeypatch):
    save = write.save

    def meanwhile(model, draft, metadata):
        save(model, draft, metadata)
        (tmp_path / "m.onnx").write_text("somebody else's")

    monkeypatch.setattr(write, "save", meanwhile)
    with pytest.raises(FileExistsError, match="appeared during the export"):
        to_onnx(fused_mixer(), tmp_path / "m.onnx", input_size=5)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "somebody else's"


def test_metadata(tmp_path):
    report = to_onnx(classifier(), tmp_path / "m.onnx", 64, verify=False, precision="fp16")
    found = {p.key: p.value for p in onnx.load(report.path).metadata_props}
    assert found["model"] == "RCViT"  # of no published size
    assert found["layers"] == "1, 1, 1, 1"
    assert found["channels"] == "8, 8, 16, 16"
    assert found["classes"] == "5"
    assert found["precision"] == "fp16"
    assert "normalised by the caller" in found["input range"]
    assert found["casvit_kernels"]


@pytest.mark.long
@pytest.mark.parametrize("top", [1.0, 255.0])
def test_normalisation_inside(tmp_path, top):
    model = classifier()
    normalize = True if top == 1.0 else Normalization(top=255.0)
    report = to_onnx(model, tmp_path / "m.onnx", 64, normalize=normalize)
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (photographs.MEAN, photographs.STD))
    (got,) = run_onnx(report.path, pixels * top)
    (wanted,) = expected(model, (pixels - mean) / std)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    found = {p.key: p.value for p in onnx.load(report.path).metadata_props}
    assert found["input range"] == f"0 to {top:g}; normalised inside"
    assert found["mean"] == "0.485, 0.456, 0.406"
    assert found["std"] == "0.229, 0.224, 0.225"


@pytest.mark.long
def test_half_precision(tmp_path):
    model = classifier()
    report = to_onnx(model, tmp_path / "half.onnx", 64, precision="fp16", batch="dynamic")
    large = [t for t in onnx.load(report.path).graph.initializer if len(t.dims) == 4]
    assert {t.data_type for t in large} == {onnx.TensorProto.FLOAT16}
    assert report.max_error > 1e-7
    assert_near(report.path, model, torch.randn(2, 3, 64, 64), tolerance=1e-2)


@pytest.mark.long
def test_half_precision_that_overflows(tmp_path):
    """The CPU would not notice: it computes fp16 in float32."""
    model = classifier()
    model.patch_embed[0].weight.data *= 1e6
    model.patch_embed[1].running_var *= 1e12
    with pytest.raises(
        ExportError, match=r"overflows in fp16: convolution gives .*precision=\"fp32"
    ):
        to_onnx(model, tmp_path / "half.onnx", 64, precision="fp16", fold=False)
    model = classifier()
    model.patch_embed[1].weight.data *= 1e6  # a norm gives three tensors
    with pytest.raises(ExportError, match=r"overflows in fp16: \w*batch_norm\w* gives"):
        to_onnx(model, tmp_path / "half.onnx", 64, precision="fp16", fold=False)
    pixels = Normalization(top=70000.0)
    with pytest.raises(ExportError, match="overflows in fp16: the input has 7e"):
        to_onnx(classifier(), tmp_path / "half.onnx", 64, precision="fp16", normalize=pixels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_photographs_alone_count_for_the_top_class(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    found, _ = prepare(classifier(), 64, 1, None).pictures()
    report = to_onnx(classifier(), tmp_path / "m.onnx", 64, batch="dynamic")
    assert report.images == len(found)


@pytest.mark.long
def test_int8_is_judged_at_every_batch_and_size(tmp_path, monkeypatch):
    seen = []
    compare = verify.compare

    def record(prepared, session, x, *rest):
        seen.append(tuple(x.shape))
        compare(prepared, session, x, *rest)

    monkeypatch.setattr(verify, "compare", record)
    images = torch.randn(2, 3, 64, 64)
    to_onnx(
        classifier(), tmp_path / "m.onnx", 64, precision="int8", calibration=images,
        batch="dynamic", dynamic_size=True,
    )  # fmt: skip
    assert {(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 96, 64), (1, 3, 81, 104)} <= set(seen)


@pytest.mark.parametrize("opset", [17, 20])
def test_int8(tmp_path, opset):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    model = classifier()
    report = to_onnx(model, tmp_path / "m.onnx", 64, precision="int8", opset=opset, batch="dynamic")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert "images" in " ".join(report.notes)
    assert report.images == 8
    written = onnx.load(report.path)
    makers = {out: node for node in written.graph.node for out in node.output}
    convs = [node for node in written.graph.node if node.op_type == "Conv"]
    quantised = [c for c in convs if c.input[1] in makers]  # behind a DequantizeLinear
    assert 0 < len(quantised) < len(convs)
    for node in written.graph.node:
        if node.op_type == "Sigmoid":
            assert makers[node.input[0]] not in quantised


@pytest.mark.long
def test_int8_takes_images_of_a_directory_or_a_tensor(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = numpy.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=numpy.uint8)
        image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    model = classifier()
    report = to_onnx(
        model, tmp_path / "d.onnx", 64, precision="int8", calibration=tmp_path / "images"
    )
    assert f"3 images (some hundred are better) of {tmp_path / 'images'}" in " ".join(report.notes)
    mixer = fused_mixer()
    given = torch.randn(40, 8, 6, 6)
    report = to_onnx(mixer, tmp_path / "m.onnx", 6, precision="int8", calibration=given)
    assert "calibrated with 40 images" in report.notes
    (got,) = run_onnx(report.path, given[:1])
    error = (got.double() - reference(mixer, given[:1])).square().mean().sqrt()
    assert error < 0.1 * reference(mixer, given[:1]).std()


def test_untrained_weights_are_pointed_out(tmp_path):
    with pytest.warns(UntrainedWeights, match="look untrained"):
        report = to_onnx(RCViT(CONFIG, num_classes=5), tmp_path / "m.onnx", 64, verify=False)
    assert any("look untrained" in note for note in report.notes)


def test_without_photographs_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    report = to_onnx(classifier(), tmp_path / "m.onnx", 64)
    assert "without photographs: skimage is needed" in report.notes[-1]
    with pytest.raises(ValueError, match="calibration: expected images of your own: skimage"):
        to_onnx(classifier(), tmp_path / "q.onnx", 64, precision="int8")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_bad_file_in_fewer_bits_is_not_kept(tmp_path, monkeypatch, precision):
    tool = {"fp16": "half", "int8": "static"}[precision]
    made = getattr(quantize, tool)

    def spoiled(model, *arguments):
        result = made(model, *arguments)
        graph = (result[0] if isinstance(result, tuple) else result).graph
        (name,) = (o.name for o in graph.output)
        last = next(n for n in graph.node if name in n.output)
        last.output[0] = "unspoiled"
        graph.node.append(onnx.helper.make_node("Add", ["unspoiled", "unspoiled"], [name]))
        return result

    monkeypatch.setattr(quantize, tool, spoiled)
    with pytest.raises(ExportError, match="output: the exported file differs"):
        to_onnx(classifier(), tmp_path / "m.onnx", 64, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, monkeypatch):
    def full(model, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OSError, match="No space left"):
        to_onnx(classifier(), tmp_path / "m.onnx", 64)
    assert list(tmp_path.iterdir()) == []


class _Branching(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 1e9 else x + 1


def test_a_module_that_cannot_be_exported_is_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), _Branching()))
    with pytest.raises(ExportError, match=r"1\.1 \(_Branching\) cannot be exported"):
        to_onnx(model, tmp_path / "m.onnx", 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [16, 999, True, "18"])
def test_bad_opset(tmp_path, opset):
    with pytest.raises(ValueError, match="opset: expected an integer from 17 to"):
        to_onnx(FusedCATM(4), tmp_path / "m.onnx", opset=opset)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int4"}, ValueError, "precision: expected one of fp32, fp16, int8, got"),
        ({"batch": "any"}, ValueError, 'batch: expected a positive integer or "dynamic"'),
        ({"calibration": torch.ones(1, 3, 64, 64)}, ValueError, "calibration: expected None"),
        (
            {"precision": "int8", "calibration": torch.ones(1, 3, 8, 8)},
            ValueError,
            r"calibration: expected floating images of shape \(N, 3, 64, 64\)",
        ),
        ({"precision": "int8", "calibration": 3}, TypeError, "calibration: .* got int"),
        ({"precision": "int8", "calibration": "/nowhere"}, ValueError, "calibration: .*nowhere"),
        ({"normalize": 3}, TypeError, "normalize: expected a bool or a Normalization"),
        (
            {"normalize": Normalization((0.5,), (0.5,))},
            ValueError,
            "normalize: expected 1 channels",
        ),
        ({"input_size": 16}, ValueError, r"input_size: \(16, 16\) is too small for this model"),
    ],
)
def test_bad_options(tmp_path, options, error, message):
    options = {"input_size": 64, **options}
    with pytest.raises(error, match=message):
        to_onnx(classifier(), tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_dynamic_size_of_what_has_none(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"dynamic_size: .* got an example of shape \(3, 4\)"):
        to_onnx(model, tmp_path / "m.onnx", example_input=torch.ones(3, 4), dynamic_size=True)


def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch):
    build = write.build

    def write_another(prepared, *arguments):
        wrong = copy.deepcopy(prepared)
        wrong.exported.model.dwc.weight.data[0] += 1e-3
        return build(wrong, *arguments)

    monkeypatch.setattr(write, "build", write_another)
    (tmp_path / "m.onnx").write_text("earlier")
    with pytest.raises(ExportError, match=r"output: the exported file differs .* expected at most"):
        to_onnx(fused_mixer(), tmp_path / "m.onnx", input_size=5, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "earlier"


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(model, draft, metadata):
        draft.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_onnx(fused_mixer(), tmp_path / "m.onnx", input_size=5)
    assert list(tmp_path.iterdir()) == []
