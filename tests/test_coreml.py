"""Core ML packages: what they hold, that they compute the model, and that wrong ones are not kept."""

import copy
import dataclasses
import errno
import warnings

import published_mixer
import pytest
import torch
from torch import nn

from casvit_kernels import AdditiveTokenMixer, FusedCATM, fuse
from casvit_kernels.demo.network import calibrate
from casvit_kernels.export import ExportError, Normalization, UntrainedWeights, to_coreml
from casvit_kernels.export.coreml import convert, verify
from casvit_kernels.export.coreml import export as coreml_module
from casvit_kernels.export.coreml.compress import gate_convolutions
from casvit_kernels.export.coreml.neural_engine import examine
from casvit_kernels.export.coreml.padding import padded
from casvit_kernels.export.mil import Program, Unsupported
from casvit_kernels.models import Config, RCViT
from casvit_kernels.models.rcvit import CONFIGS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("coremltools")

TINY = Config(layers=(1, 1, 1, 1), dims=(16, 16, 24, 20))
SIZE = 48


def as_trained(model, x=None, seed=0):
    """BatchNorm with statistics (of an image ``x`` if given) and a head that tells images apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.3, generator=generator)
                m.running_var.uniform_(0.5, 1.5, generator=generator)
                m.weight.uniform_(0.5, 1.5, generator=generator)
                m.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(m, nn.Linear):
                m.weight.normal_(0, m.in_features**-0.5, generator=generator)
    if x is not None:
        calibrate(model, x)
    return model.eval()


def network(**options):
    torch.manual_seed(0)
    model = RCViT(TINY, **{"num_classes": 5, **options})
    return as_trained(model, random(16, model.in_chans, SIZE, SIZE, seed=3))


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def exact(model, x):
    """Float64, through the plain mixers."""
    from casvit_kernels.surgery.fold import plain_copy

    return plain_copy(model).double().eval()(x.double())


def assert_near(got, expected, relative):
    error = (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= relative, f"relative error {error:.3g}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The same network once in each precision: model, report, program."""
    made = {}

    def export(precision):
        if precision not in made:
            path = tmp_path_factory.mktemp(precision) / "net.mlpackage"
            options = {"precision": precision}
            if precision == "w8a8":
                options = {"precision": "int8", "calibration": random(24, 3, SIZE, SIZE, seed=2)}
            model = network()
            report = to_coreml(model, path, input_size=SIZE, **options)
            made[precision] = model, report, Program(path)
        return made[precision]

    return export


# relative error of the whole network, root mean square
USUAL = {"fp32": 1e-5, "fp16": 0.02, "int8": 0.1, "palettized": 0.2, "w8a8": 0.4}


@pytest.mark.long
@pytest.mark.parametrize("precision", USUAL)
def test_the_saved_program_computes_the_model(exported, precision):
    model, report, program = exported(precision)
    x = random(1, 3, SIZE, SIZE)
    expected = exact(model, x)
    (got,) = program({"input": x}).values()
    assert_near(got, expected, USUAL[precision])
    assert 0 < report.mean_error <= report.max_error
    assert report.max_error >= float((got - expected).abs().max()) / 10
    assert report.images == 8
    assert report.top1 >= 0.75
    assert (report.top1 == 1.0) or precision not in ("fp32", "fp16")


def test_errors_grow_as_precision_falls(exported):
    errors = [exported(precision)[1].mean_error for precision in USUAL]
    assert errors[0] < errors[1] < errors[2] < min(errors[3:])
    sizes = {precision: exported(precision)[1].bytes for precision in USUAL}
    assert sizes["fp32"] > sizes["fp16"] > sizes["int8"] > sizes["palettized"]


def test_the_package_describes_itself(exported):
    import coremltools

    _, report, program = exported("fp16")
    spec = coremltools.models.MLModel(str(report.path), skip_model_load=True).get_spec()
    assert spec.WhichOneof("Type") == "mlProgram"
    assert spec.specificationVersion == coremltools.target.iOS15
    assert program.inputs == (("input", "multiArray", (1, 3, SIZE, SIZE)),)
    assert program.outputs == (("output", "multiArray", (1, 5)),)
    metadata = program.metadata
    assert metadata["model"] == "RCViT"
    assert metadata["classes"] == "5"
    assert metadata["precision"] == "fp16"
    assert "casvit_kernels" in metadata
    assert "normalised by the caller" in metadata["input range"]


def test_compression_leaves_the_gates(exported):
    _, _, original = exported("fp16")
    for precision in ("int8", "palettized", "w8a8"):
        _, _, program = exported(precision)
        small = {op.outputs[0][0] for op in program.operations if "constexpr" in op.type}
        assert small
        gates = gate_convolutions(program)
        assert len(gates) == 16 == len(gate_convolutions(original))
        for operation in program.operations:
            if operation.name in gates:
                assert operation.parameters["weight"][0][0] not in small


def test_activations_of_eight_bits(exported):
    for precision in ("int8", "w8a8"):
        _, _, program = exported(precision)
        small = {op.outputs[0][0] for op in program.operations if op.type == "dequantize"}
        for operation in program.operations:
            if operation.type in ("conv", "linear"):
                assert (operation.parameters["x"][0][0] in small) == (precision == "w8a8")
    used = {op.type: [p[0][0] for p in op.parameters.values()] for op in program.operations}
    assert {"sigmoid", "mul"} <= set(used)


def test_nothing_is_left_of_batch_norm(exported):
    _, report, program = exported("fp16")
    assert "batch_norm" not in {op.type for op in program.operations}
    assert any("norms folded" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["plain", "fused", "user's", "user's fused"])
def test_whoever_wrote_the_mixer(tmp_path, kind, capfd):
    make = {"plain": AdditiveTokenMixer, "fused": FusedCATM}.get(
        kind, published_mixer.RewrittenMixer
    )
    model = as_trained(published_mixer.Net(make)).train()
    if kind == "user's fused":
        fuse(model)
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    report = to_coreml(model, tmp_path / "net.mlpackage", input_size=(12, 9), batch=2)
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["net.mlpackage"]
    assert any("training mode" in note for note in report.notes)
    assert all(m.training for m in model.modules())
    assert dict(model.named_modules()) == modules
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    x = random(2, 3, 12, 9)
    (got,) = Program(report.path)({"input": x}).values()
    assert_near(got, exact(model, x), USUAL["fp16"])


def test_a_single_mixer(tmp_path):
    mixer = as_trained(FusedCATM(12))
    report = to_coreml(mixer, tmp_path / "m.mlpackage", input_size=(6, 5), precision="fp32")
    x = random(1, 12, 6, 5)
    (got,) = Program(report.path)({"input": x}).values()
    assert_near(got, exact(mixer, x), 1e-5)
    assert report.top1 is None


def test_a_dense_backbone_has_named_outputs(tmp_path):
    model = network(fork_feat=True)
    report = to_coreml(model, tmp_path / "m.mlpackage", input_size=SIZE)
    program = Program(report.path)
    assert [o.name for o in program.outputs] == ["stage1", "stage2", "stage3", "stage4"]
    x = random(1, 3, SIZE, SIZE)
    results = program({"input": x})
    for name, expected in zip(
        ("stage1", "stage2", "stage3", "stage4"), exact(model, x), strict=True
    ):
        assert_near(results[name], expected, USUAL["fp16"])


def test_an_image_classifier(tmp_path):
    model = network()
    labels = ["ant", "bee", "cat", "dog", "eel"]
    report = to_coreml(
        model,
        tmp_path / "m.mlpackage",
        input_size=(SIZE, 40),
        image_input=True,
        class_labels=labels,
        deployment_target="iOS16",
    )
    program = Program(report.path)
    assert program.inputs == (("input", "image", (SIZE, 40)),)
    pixels = torch.randint(0, 256, (1, 3, SIZE, 40), generator=torch.Generator().manual_seed(0))
    results = program({"input": pixels})
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = exact(model, (pixels / 255 - mean) / std).softmax(1)[0]
    assert results["classLabel"] == labels[int(expected.argmax())]
    assert list(results["classLabel_probs"]) == labels
    got = torch.tensor(list(results["classLabel_probs"].values()))
    assert_near(got, expected, 0.02)
    assert "0 to 255" in program.metadata["input range"]


def test_a_grayscale_image_with_its_own_normalisation(tmp_path):
    model = network(in_chans=1, num_classes=2)
    inside = Normalization((0.5,), (0.25,), top=255)
    report = to_coreml(
        model, tmp_path / "m.mlpackage", input_size=SIZE, image_input=True, normalize=inside
    )
    pixels = torch.randint(0, 256, (1, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    (got,) = Program(report.path)({"input": pixels}).values()
    assert_near(got, exact(model, (pixels / 255 - 0.5) / 0.25), 0.02)


def test_a_range_of_batches(tmp_path):
    model = network()
    report = to_coreml(model, tmp_path / "m.mlpackage", input_size=SIZE, batch=(1, 4))
    program = Program(report.path)
    for batch in (1, 3, 4):
        x = random(batch, 3, SIZE, SIZE)
        (got,) = program({"input": x}).values()
        assert_near(got, exact(model, x), USUAL["fp16"])
    assert any("flexible" in finding for finding in report.neural_engine.findings)


def test_several_sizes(tmp_path):
    model = network()
    report = to_coreml(model, tmp_path / "m.mlpackage", input_size=SIZE, other_sizes=[(56, 40), 64])
    program = Program(report.path)
    for size in ((SIZE, SIZE), (56, 40), (64, 64)):
        x = random(1, 3, *size)
        (got,) = program({"input": x}).values()
        assert_near(got, exact(model, x), USUAL["fp16"])


# Padded channels


def test_padding_of_the_published_sizes():
    assert [
        padded(as_trained(RCViT(Config((1, 1, 1, 1), config.dims), num_classes=2)))[1].after
        for config in CONFIGS.values()
    ] == [(48, 56, 112, 224), (48, 64, 128, 256), (64, 96, 192, 384), (96, 128, 256, 512)]


@pytest.mark.parametrize("options", [{}, {"fork_feat": True}, {"num_classes": 0}, {"fused": True}])
def test_a_padded_network_is_the_same_function(options):
    model = as_trained(
        RCViT(Config((1, 2, 1, 1), (10, 12, 16, 20)), **{"num_classes": 3, **options})
    )
    before = copy.deepcopy(model.state_dict())
    wide, report = padded(model)
    assert report == ((10, 12, 16, 20), (16, 16, 16, 24))
    x = random(2, 3, 40, 36).double()
    expected = exact(model, x)
    got = wide.double()(x)
    for one, other in zip(
        *(o if isinstance(o, list) else [o] for o in (got, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_padded_channels_stay_zero():
    model = network()
    wide, _ = padded(model)
    seen = []
    for m in wide.modules():
        if isinstance(m, nn.Conv2d) and m.out_channels == 24 and m.groups == 24:
            m.register_forward_hook(lambda m, args, out: seen.append(out[:, 20:].abs().max()))
    with torch.no_grad():
        wide(random(1, 3, SIZE, SIZE))
    # depthwise convolutions of the last stage, of 24 channels as the third stage's are
    assert seen[-5:] == [0.0] * 5


@pytest.mark.parametrize("bias", [False, True])
def test_a_padded_mixer_is_the_same_function(bias):
    mixer = as_trained(FusedCATM(20, attn_bias=bias))
    wide, report = padded(mixer)
    assert report == ((20,), (24,))
    x = random(2, 20, 5, 7).double()
    torch.testing.assert_close(wide.double()(x), exact(mixer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("dense", [False, True])
def test_a_padded_program(tmp_path, dense):
    model = network(fork_feat=dense)
    report = to_coreml(model, tmp_path / "m.mlpackage", input_size=SIZE, pad_channels=True)
    program = Program(report.path)
    channels = {
        declared.shape[1]
        for op in program.operations
        for name, declared in op.outputs
        if declared is not None and len(declared.shape) == 4 and op.type in ("conv", "mul")
    }
    assert 20 not in channels
    assert 24 in channels
    assert any("(16, 16, 24, 24)" in done for done in report.neural_engine.done)
    x = random(1, 3, SIZE, SIZE)
    got, expected = program({"input": x}), exact(model, x)
    for name, value in zip(got, expected if dense else [expected], strict=True):
        assert got[name].shape == value.shape
        assert_near(got[name], value, USUAL["fp16"])


def test_padding_of_a_network_with_another_activation(tmp_path):
    """Known by its state dict, which does not tell: the comparison does."""
    model = network()
    for block in (stage[0] for stage in model.network[::2]):
        block.mlp.act = nn.ReLU()
    with pytest.raises(ExportError, match="output: the exported program differs"):
        to_coreml(model, tmp_path / "m.mlpackage", input_size=SIZE, pad_channels=True)
    assert list(tmp_path.iterdir()) == []


def test_padding_of_something_else(tmp_path):
    with pytest.raises(
        ValueError, match="pad_channels: expected an RCViT or a mixer, got Sequential"
    ):
        to_coreml(
            nn.Sequential(nn.Conv2d(3, 4, 1)),
            tmp_path / "m.mlpackage",
            input_size=8,
            pad_channels=True,
        )
    assert list(tmp_path.iterdir()) == []


# The Neural Engine


def test_the_neural_engine_report(exported):
    _, report, program = exported("fp16")
    engine = report.neural_engine
    count = {kind.type: (kind.count, kind.fit) for kind in engine.operations}
    assert count["split"] == (4, "runs")
    assert count["conv 3x3 depthwise"] == (20, "likely")
    assert count["conv 3x3"] == (5, "likely")
    assert count["cast"] == (2, "not known")
    assert sum(kind.count for kind in engine.operations) == len(program.operations)
    odd = next(finding for finding in engine.findings if "multiple of 8" in finding)
    assert "20" in odd
    assert "24" not in odd
    assert "NCHW" in engine.layout
    assert "0 transposes" in engine.layout
    assert any("64 bytes" in finding and "2 pixels" in finding for finding in engine.findings)
    assert "fixed input shape" in engine.done
    assert not any("flexible" in finding for finding in engine.findings)
    text = str(report)
    assert "only a device can tell" in text
    assert "multiple of 8" in text


def test_fp32_is_not_for_the_neural_engine(exported):
    _, report, _ = exported("fp32")
    assert any("fp32" in finding for finding in report.neural_engine.findings)
    assert not any("fp32" in f for f in exported("fp16")[1].neural_engine.findings)


def test_an_operation_in_no_published_network(exported):
    _, _, program = exported("fp16")
    other = copy.copy(program)
    other.operations = [
        op._replace(type="transpose") if op.type == "relu" else op for op in program.operations
    ]
    engine = examine(other)
    assert any("no network" in finding and "transpose" in finding for finding in engine.findings)
    assert "10 transposes" in engine.layout


# A package that is not the model is not kept


def corrupted(change):
    """Another `convert.to_program`, for a model that differs from the one that is compared with."""
    to_program = convert.to_program

    def converted(coremltools, prepared, options):
        wrong = copy.deepcopy(prepared)
        return to_program(coremltools, change(wrong) or wrong, options)

    return converted


def one_weight(prepared):
    prepared.exported.model.network[2][0].mlp.fc1.weight.data[3, 2] += 0.5


def no_bias(prepared):
    prepared.exported.model.network[0][0].attn.dwc.bias.data.zero_()


def slightly(prepared):
    prepared.exported.model.network[4][0].attn.qkv.weight.data *= 1 + 1e-4


def shifted_scores(prepared):
    prepared.exported.model.head.bias.data += 0.5


def swapped_outputs(prepared):
    class Swapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input):
            first, second, *rest = self.model(input)
            return (second, first, *rest)

    return dataclasses.replace(prepared, exported=Swapped(prepared.plain))


class Twins(nn.Module):
    """Two outputs of one shape."""

    def __init__(self):
        super().__init__()
        self.mixer = FusedCATM(4)
        self.other = FusedCATM(4)

    def forward(self, x):
        return self.mixer(x), self.other(x)


@pytest.mark.long
@pytest.mark.parametrize("change", [one_weight, no_bias])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_wrong_program_is_not_kept(tmp_path, monkeypatch, change, precision):
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    (path / "earlier").write_text("kept")
    monkeypatch.setattr(convert, "to_program", corrupted(change))
    with pytest.raises(ExportError, match="output: the exported program differs"):
        to_coreml(network(), path, input_size=SIZE, precision=precision, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.mlpackage"]
    assert (path / "earlier").read_text() == "kept"


def test_a_subtle_change_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "to_program", corrupted(slightly))
    with pytest.raises(ExportError, match="differs from the float64 reference"):
        to_coreml(network(), tmp_path / "m.mlpackage", input_size=SIZE, precision="fp32")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_is_compared_before_its_softmax(tmp_path, monkeypatch):
    """The same number added to all scores leaves the probabilities as they are."""
    monkeypatch.setattr(convert, "to_program", corrupted(shifted_scores))
    with pytest.raises(ExportError, match="output: the exported program differs"):
        to_coreml(network(), tmp_path / "m.mlpackage", input_size=SIZE, class_labels=list("abcde"))
    assert list(tmp_path.iterdir()) == []


def test_swapped_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "to_program", corrupted(swapped_outputs))
    with pytest.raises(ExportError, match="output0: the exported program differs"):
        to_coreml(as_trained(Twins()), tmp_path / "m.mlpackage", input_size=6)
    assert list(tmp_path.iterdir()) == []


def test_overflow_in_fp16_is_named(tmp_path):
    model = network()
    model.patch_embed[4].weight.data *= 3e4
    with pytest.raises(
        ExportError, match=r"overflows in fp16 at operation \w+ \(.*precision=\"fp32\""
    ):
        to_coreml(model, tmp_path / "m.mlpackage", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_more_error_than_tolerated(tmp_path):
    with pytest.raises(ExportError, match=r"expected at most 0% of int8 \(tolerance\)"):
        to_coreml(
            network(), tmp_path / "m.mlpackage", input_size=SIZE, precision="int8", tolerance=1e-4
        )
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_compressed_weight_is_not_kept(exported):
    _, _, original = exported("fp16")
    for precision in ("int8", "palettized"):
        program = copy.copy(exported(precision)[2])
        verify.compressed_constants(program, original, precision)
        program.constants = dict(program.constants)
        name = next(op.outputs[0][0] for op in program.operations if "constexpr" in op.type)
        program.constants[name] = program.constants[name].flip(0)
        with pytest.raises(ExportError, match=f"compressed constant {name}"):
            verify.compressed_constants(program, original, precision)


def test_a_program_that_cannot_be_evaluated_is_not_kept(tmp_path, monkeypatch):
    from casvit_kernels.export.coreml.mil import operations

    monkeypatch.delitem(operations.FUNCTIONS, "gelu")
    with pytest.raises((ExportError, Unsupported), match="operation gelu"):
        to_coreml(network(), tmp_path / "m.mlpackage", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_without_verification(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "to_program", corrupted(one_weight))
    report = to_coreml(network(), tmp_path / "m.mlpackage", input_size=SIZE, verify=False)
    assert report.max_error is None
    assert any("not verified" in note for note in report.notes)


@pytest.mark.parametrize("moment", ["convert", "save", "check"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, moment, error):
    module, name = {
        "convert": (convert, "to_program"),
        "save": (convert, "save"),
        "check": (coreml_module, "check_description"),
    }[moment]
    real = getattr(module, name)

    def interrupted(*arguments):
        if moment == "save":
            real(*arguments)
        raise error

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(type(error)):
        to_coreml(as_trained(FusedCATM(4)), tmp_path / "m.mlpackage", input_size=4)
    assert list(tmp_path.iterdir()) == []


def test_replacing_a_package(tmp_path):
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    (path / "old").write_text("old")
    mixer = as_trained(FusedCATM(4))
    with pytest.raises(FileExistsError, match=r"m\.mlpackage exists already"):
        to_coreml(mixer, path, input_size=4)
    assert (path / "old").exists()
    to_coreml(mixer, path, input_size=4, overwrite=True)
    assert not (path / "old").exists()
    assert (path / "Manifest.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["m.mlpackage"]


# On a Mac


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_predictions_on_a_mac_are_compared(tmp_path, monkeypatch, factor):
    import coremltools

    monkeypatch.setattr(verify.sys, "platform", "darwin")

    class Mac:
        def __init__(self, path):
            self.program = Program(path)

        def predict(self, inputs):
            results = self.program({k: torch.from_numpy(v) for k, v in inputs.items()})
            return {name: factor * value.numpy() for name, value in results.items()}

    real = coremltools.models.MLModel
    monkeypatch.setattr(
        coremltools.models,
        "MLModel",
        lambda path, **options: real(path, **options) if options else Mac(path),
    )
    path = tmp_path / "m.mlpackage"
    mixer = as_trained(FusedCATM(4))
    if factor == 1.0:
        report = to_coreml(mixer, path, input_size=4)
        assert any(note.startswith("Core ML on this Mac: max error") for note in report.notes)
    else:
        with pytest.raises(ExportError, match="output: Core ML's prediction differs"):
            to_coreml(mixer, path, input_size=4)
        assert list(tmp_path.iterdir()) == []


# Arguments


class _Untouchable(nn.Module):
    def forward(self, x):
        raise AssertionError("computed")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "int4"}, ValueError, "precision: expected one of fp16, .*, got 'int4'"),
        ({"deployment_target": "iOS14"}, ValueError, "deployment_target: .* iOS15, .*'iOS14'"),
        ({"deployment_target": "iOS15", "precision": "int8"}, ValueError, "'int8' needs iOS16"),
        (
            {"deployment_target": "iOS16", "precision": "int8", "calibration": torch.ones(1)},
            ValueError,
            "calibration needs iOS17",
        ),
        ({"calibration": torch.ones(1)}, ValueError, "calibration: expected None .*'fp16'"),
        ({"tolerance": -1.0}, ValueError, "tolerance: expected a number above 0"),
        ({"batch": (3, 2)}, ValueError, r"batch: .*pair \(smallest, largest\), got \(3, 2\)"),
        ({"batch": 0}, ValueError, "batch: expected a positive integer"),
        ({"image_input": True, "normalize": True}, ValueError, "normalize: expected a Normalization"),
    ],
)  # fmt: skip
def test_bad_arguments_before_anything_is_computed(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        to_coreml(_Untouchable(), tmp_path / "m.mlpackage", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_labels": ["a", "b"]}, ValueError, "class_labels: expected 5 .*, got 2"),
        ({"class_labels": list("abcda")}, ValueError, "got 5, 4 of them different"),
        ({"class_labels": "abcde"}, TypeError, "class_labels: expected a sequence of strings"),
        ({"class_labels": list("abcde"), "batch": 2}, ValueError, "class_labels: .*batch=1"),
        ({"image_input": True, "batch": 2}, ValueError, "image_input: expected one image"),
        ({"other_sizes": [64], "batch": (1, 2)}, ValueError, "other_sizes: expected none"),
        ({"other_sizes": [4.5]}, (ValueError, TypeError), "other_sizes|iterable"),
        (
            {"precision": "int8", "calibration": torch.ones(2, 3, 8, 8)},
            ValueError,
            "calibration: expected",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        to_coreml(network(), tmp_path / "m.mlpackage", input_size=SIZE, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cannot_be_converted_is_named(tmp_path):
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.linalg.matrix_exp(self.conv(x))

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(), Strange()))
    with pytest.raises(
        ExportError, match=r"1\.1 \(Strange\) cannot be converted to Core ML: .*matrix_exp"
    ):
        to_coreml(model, tmp_path / "m.mlpackage", input_size=4)
    assert list(tmp_path.iterdir()) == []


def test_an_example_gives_the_batch(tmp_path):
    mixer = as_trained(FusedCATM(4))
    report = to_coreml(mixer, tmp_path / "m.mlpackage", example_input=random(2, 4, 5, 3))
    assert Program(report.path).inputs == (("input", "multiArray", (2, 4, 5, 3)),)
    with pytest.raises(ValueError, match=r"batch: .* example_input, 2, got \(1, 4\)"):
        to_coreml(mixer, tmp_path / "n.mlpackage", example_input=random(2, 4, 5, 3), batch=(1, 4))


def test_numpy_random_state_is_the_callers(tmp_path):
    import numpy

    numpy.random.seed(3)
    expected = numpy.random.rand()
    numpy.random.seed(3)
    to_coreml(network(), tmp_path / "m.mlpackage", input_size=SIZE)
    assert numpy.random.rand() == expected


def test_untrained_weights_are_pointed_out(tmp_path):
    with pytest.warns(UntrainedWeights):
        to_coreml(FusedCATM(4), tmp_path / "m.mlpackage", input_size=4)


@pytest.mark.parametrize("moment", ["convert", "compress"])
def test_a_disk_that_is_full_where_weights_are_written(tmp_path, moment):
    """coremltools writes them by a library of its own, into the directory for temporary files."""
    resource = pytest.importorskip("resource")
    import signal

    import coremltools.optimize.coreml as optimize

    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    path = tmp_path / "m.mlpackage"
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(*arguments, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old_limit[1]))
        return real(*arguments, **options)

    module, name = {
        "convert": (convert, "_traced"),
        "compress": (optimize, "linear_quantize_weights"),
    }[moment]
    real = getattr(module, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, limited)
        try:
            with pytest.raises(OSError, match=r"^path: .*m\.mlpackage was not written: .*full\?"):
                to_coreml(model, path, input_size=8, precision="int8")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
            signal.signal(signal.SIGXFSZ, old_signal)
    assert list(tmp_path.iterdir()) == []
