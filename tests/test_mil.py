"""The evaluator of Core ML programs: every operation alone, from a saved package, against PyTorch."""

import logging
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from casvit_kernels.export.mil import Program, Unsupported

pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def ct():
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
    logging.disable(disabled)
    return coremltools


@pytest.fixture
def saved(ct, tmp_path):
    """Builds a program of inputs x (and y) and saves it; no pass of coremltools changes it."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    def build(function, *shapes, dtype="fp32", target="iOS17", **options):
        kind = {"fp32": types.fp32, "fp16": types.fp16}[dtype]
        specs = [mb.TensorSpec(shape, dtype=kind) for shape in shapes]
        decorate = mb.program(input_specs=specs, opset_version=getattr(ct.target, target))
        if len(shapes) == 1:
            program = decorate(lambda x: function(mb, x))
        else:
            program = decorate(lambda x, y: function(mb, x, y))
        logging.disable(logging.WARNING)
        try:
            model = ct.convert(
                program,
                convert_to="mlprogram",
                pass_pipeline=ct.PassPipeline.EMPTY,
                minimum_deployment_target=getattr(ct.target, target),
                skip_model_load=True,
                **options,
            )
            path = tmp_path / "program.mlpackage"
            model.save(str(path))
        finally:
            logging.disable(logging.NOTSET)
        return path

    return build


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


WEIGHT = random(6, 2, 3, 2).numpy()
BIAS = random(6).numpy()
VECTOR = {name: random(4, 1 + i)[:, 0].numpy() for i, name in enumerate(("mean", "gamma", "beta"))}
VARIANCE = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
IMAGE = (2, 4, 5, 6)


def convolution(mb, x):
    return mb.conv(
        x=x,
        weight=WEIGHT.astype(dtype_of(x)),
        bias=BIAS.astype(dtype_of(x)),
        pad_type="custom",
        pad=[1, 0, 2, 1],
        strides=[2, 1],
        dilations=[1, 2],
        groups=2,
    )


def dtype_of(x):
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(x.dtype)


def normed(mb, x, **more):
    kind = dtype_of(x)
    return mb.batch_norm(
        x=x,
        mean=VECTOR["mean"].astype(kind),
        variance=VARIANCE.astype(kind),
        epsilon=kind(1e-3),
        **{key: value.astype(kind) for key, value in more.items()},
    )


def t(array):
    return torch.from_numpy(array).double()


# name: builder, what it should compute in float64, shapes
OPERATIONS = {
    "add": (lambda mb, x, y: mb.add(x=x, y=y), torch.add, IMAGE, (4, 1, 1)),
    "sub": (lambda mb, x, y: mb.sub(x=x, y=y), torch.sub, IMAGE, IMAGE),
    "mul": (lambda mb, x, y: mb.mul(x=x, y=y), torch.mul, IMAGE, (2, 1, 5, 6)),
    "real_div": (lambda mb, x, y: mb.real_div(x=x, y=y), torch.div, IMAGE, (1, 4, 1, 1)),
    "relu": (lambda mb, x: mb.relu(x=x), torch.relu, IMAGE),
    "sigmoid": (lambda mb, x: mb.sigmoid(x=x), torch.sigmoid, IMAGE),
    "gelu": (lambda mb, x: mb.gelu(x=x), F.gelu, IMAGE),
    "gelu tanh": (
        lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x: F.gelu(x, approximate="tanh"),
        IMAGE,
    ),
    "gelu sigmoid": (
        lambda mb, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x: x / (1 + torch.exp(-1.702 * x)),
        IMAGE,
    ),
    "softmax": (lambda mb, x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1), (2, 7)),
    "identity": (lambda mb, x: mb.identity(x=x), lambda x: x, IMAGE),
    "conv": (
        convolution,
        lambda x: F.conv2d(
            F.pad(x, (2, 1, 1, 0)), t(WEIGHT), t(BIAS), stride=(2, 1), dilation=(1, 2), groups=2
        ),
        IMAGE,
    ),
    "conv valid": (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT[:, :, :1, :1].repeat(2, 1).astype(dtype_of(x))),
        lambda x: F.conv2d(x, t(WEIGHT)[:, :, :1, :1].repeat_interleave(2, 1)),
        IMAGE,
    ),
    "linear": (
        lambda mb, x: mb.linear(
            x=x,
            weight=WEIGHT.reshape(6, 12).astype(dtype_of(x)),
            bias=BIAS.astype(dtype_of(x)),
        ),
        lambda x: F.linear(x, t(WEIGHT).reshape(6, 12), t(BIAS)),
        (3, 12),
    ),
    "matmul": (
        lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True),
        lambda x, y: x @ y.mT,
        (2, 3, 4),
        (2, 5, 4),
    ),
    "batch_norm": (
        lambda mb, x: normed(mb, x, gamma=VECTOR["gamma"], beta=VECTOR["beta"]),
        lambda x: F.batch_norm(
            x, t(VECTOR["mean"]), t(VARIANCE), t(VECTOR["gamma"]), t(VECTOR["beta"]), eps=1e-3
        ),
        IMAGE,
    ),
    "batch_norm plain": (
        normed,
        lambda x: F.batch_norm(x, t(VECTOR["mean"]), t(VARIANCE), eps=1e-3),
        IMAGE,
    ),
    "max_pool": (
        lambda mb, x: mb.max_pool(
            x=x, kernel_sizes=[2, 3], strides=[2, 1], pad_type="custom", pad=[1, 0, 0, 2]
        ),
        lambda x: F.max_pool2d(F.pad(x, (0, 2, 1, 0), value=float("-inf")), (2, 3), (2, 1)),
        IMAGE,
    ),
    "max_pool valid": (
        lambda mb, x: mb.max_pool(x=x, kernel_sizes=[1, 1], strides=[2, 2], pad_type="valid"),
        lambda x: x[..., ::2, ::2],
        IMAGE,
    ),
    "upsample_nearest_neighbor": (
        lambda mb, x: mb.upsample_nearest_neighbor(
            x=x, scale_factor_height=2.0, scale_factor_width=3.0
        ),
        lambda x: F.interpolate(x, scale_factor=(2.0, 3.0), mode="nearest"),
        IMAGE,
    ),
    "upsample_bilinear": (
        lambda mb, x: mb.upsample_bilinear(
            x=x, scale_factor_height=2.0, scale_factor_width=4.0, align_corners=False
        ),
        lambda x: F.interpolate(x, (10, 24), mode="bilinear", align_corners=False),
        IMAGE,
    ),
    "upsample_bilinear corners": (
        lambda mb, x: mb.upsample_bilinear(
            x=x, scale_factor_height=2.0, scale_factor_width=2.0, align_corners=True
        ),
        lambda x: F.interpolate(x, (10, 12), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "resize_bilinear": (
        lambda mb, x: mb.resize_bilinear(
            x=x, target_size_height=7, target_size_width=9, sampling_mode="UNALIGN_CORNERS"
        ),
        lambda x: F.interpolate(x, (7, 9), mode="bilinear", align_corners=False),
        IMAGE,
    ),
    "resize_bilinear corners": (
        lambda mb, x: mb.resize_bilinear(
            x=x, target_size_height=7, target_size_width=9, sampling_mode="STRICT_ALIGN_CORNERS"
        ),
        lambda x: F.interpolate(x, (7, 9), mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "reduce_mean": (
        lambda mb, x: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True),
        lambda x: x.mean((2, 3), keepdim=True),
        IMAGE,
    ),
    "reduce_mean flat": (
        lambda mb, x: mb.reduce_mean(x=x, axes=[-1, -2], keep_dims=False),
        lambda x: x.mean((2, 3)),
        IMAGE,
    ),
    "split": (
        lambda mb, x: mb.split(x=x, split_sizes=[1, 3], axis=1),
        lambda x: x.split([1, 3], 1),
        IMAGE,
    ),
    "split even": (
        lambda mb, x: mb.split(x=x, num_splits=3, axis=-1),
        lambda x: x.chunk(3, -1),
        IMAGE,
    ),
    "concat": (
        lambda mb, x, y: mb.concat(values=[x, y], axis=1),
        lambda x, y: torch.cat([x, y], 1),
        IMAGE,
        (2, 1, 5, 6),
    ),
    "reshape": (
        lambda mb, x: mb.reshape(x=x, shape=[2, -1]),
        lambda x: x.reshape(2, -1),
        IMAGE,
    ),
    "slice_by_index": (
        lambda mb, x: mb.slice_by_index(
            x=x, begin=[0, 1, 0, 0], end=[0, 3, -1, 0],
            begin_mask=[True, False, False, True], end_mask=[True, False, False, True],
        ),
        lambda x: x[:, 1:3, 0:-1],
        IMAGE,
    ),
    "expand_dims": (
        lambda mb, x: mb.expand_dims(x=x, axes=[0, -1]),
        lambda x: x[None, ..., None],
        (3, 4),
    ),
    "squeeze": (
        lambda mb, x: mb.squeeze(x=x, axes=[1, 3]),
        lambda x: x.squeeze(3).squeeze(1),
        (2, 1, 4, 1),
    ),
    "transpose": (
        lambda mb, x: mb.transpose(x=x, perm=[0, 2, 3, 1]),
        lambda x: x.permute(0, 2, 3, 1),
        IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(saved, name, dtype):
    build, exact, *shapes = OPERATIONS[name]
    program = Program(saved(build, *shapes, dtype=dtype))
    assert program.operations[-1].type == name.split()[0]
    inputs = [random(*shape) * 2 for shape in shapes]
    if dtype == "fp16":
        inputs = [x.half() for x in inputs]
    got = list(program(dict(zip("xy", inputs, strict=False))).values())
    with torch.no_grad():
        expected = exact(*(x.double() for x in inputs))
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    assert len(got) == len(expected)
    for result, value in zip(got, expected, strict=True):
        assert result.dtype is (torch.float16 if dtype == "fp16" else torch.float32)
        # In fp16 the parameters are rounded, too, which an exact sum does not see.
        step = 1e-3 if dtype == "fp16" else 1e-6
        torch.testing.assert_close(result.double(), value, rtol=step, atol=4 * step)


def test_enlarging_by_no_whole_number_is_not_guessed(saved):
    """Which neighbour is nearest Core ML's documentation does not say."""
    path = saved(
        lambda mb, x: mb.upsample_nearest_neighbor(
            x=x, scale_factor_height=1.4, scale_factor_width=2.0
        ),
        IMAGE,
    )
    with pytest.raises(Unsupported, match=r"scale_factor_height = 1.4"):
        Program(path)({"x": random(*IMAGE)})


def test_every_operation_is_tested():
    from casvit_kernels.export.coreml.mil.operations import FUNCTIONS

    elsewhere = {name for name in FUNCTIONS if name.startswith("constexpr_")}
    elsewhere |= {"cast", "quantize", "dequantize", "classify"}
    assert {name.split()[0] for name in OPERATIONS} | elsewhere == set(FUNCTIONS)


# Rounding


def test_every_result_is_rounded_to_fp16(saved):
    def function(mb, x):
        y = mb.add(x=x, y=np.float16(2048))  # fp16 has steps of 2 there
        return mb.sub(x=y, y=np.float16(2048))

    program = Program(saved(function, (4,), dtype="fp16"))
    seen = []
    x = torch.tensor([0.6, 1.0, 2.9, 3.1])
    (out,) = program(
        {"x": x}, lambda operation, value: seen.append((operation.type, value))
    ).values()
    assert out.tolist() == [0.0, 0.0, 2.0, 4.0]
    assert [name for name, _ in seen] == ["add", "sub"]
    assert seen[0][1].tolist() == [2048.0, 2048.0, 2050.0, 2052.0]


def test_a_sum_inside_an_operation_is_not_rounded(saved):
    program = Program(saved(lambda mb, x: mb.reduce_mean(x=x, axes=[0]), (4096,), dtype="fp16"))
    (out,) = program({"x": torch.full((4096,), 30.0)}).values()  # the sum exceeds fp16
    assert out.item() == 30.0


def test_overflow_in_fp16(saved):
    program = Program(saved(lambda mb, x: mb.mul(x=x, y=x), (2,), dtype="fp16"))
    (out,) = program({"x": torch.tensor([255.0, 257.0])}).values()
    assert out.tolist() == [65024.0, float("inf")]


def test_cast(saved):
    def function(mb, x):
        return mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32")

    (out,) = Program(saved(function, (1,)))({"x": torch.tensor([1 + 2.0**-12])}).values()
    assert out.dtype is torch.float32
    assert out.item() == 1.0


@pytest.mark.parametrize("axis", [None, 1])
def test_quantised_activations(saved, axis):
    scale = np.float32(0.5) if axis is None else np.array([0.5, 0.25, 1, 2], np.float32)
    more = {} if axis is None else {"axis": axis}
    zero = np.uint8(3) if axis is None else np.array([3, 0, 1, 2], np.uint8)

    def function(mb, x):
        small = mb.quantize(input=x, scale=scale, zero_point=zero, output_dtype="uint8", **more)
        return mb.dequantize(input=small, scale=scale, zero_point=zero, **more)

    x = random(*IMAGE) * 50
    program = Program(saved(function, IMAGE))
    seen = []
    (out,) = program({"x": x}, lambda operation, value: seen.append(value)).values()
    assert seen[0].dtype is torch.uint8
    step, origin = (
        torch.from_numpy(np.asarray(v)).float().reshape(() if axis is None else (1, -1, 1, 1))
        for v in (scale, zero)
    )
    expected = ((x / step + origin).round().clamp(0, 255) - origin) * step
    torch.testing.assert_close(out, expected)


# Compressed constants


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_palettes(ct, saved, tmp_path, target, bits):
    """Few different weights, so that the compression loses nothing."""
    if (target, bits) == ("iOS16", 3):
        pytest.skip("iOS 16 has no palettes of 3 bits")
    from coremltools.optimize import coreml

    table = random(2**bits).half().numpy()
    index = np.arange(32 * 30).reshape(32, 30, 1, 1) * 7 % 2**bits
    weight = table[index]
    path = saved(
        lambda mb, x: mb.conv(x=x, weight=weight), (1, 30, 1, 2), dtype="fp16", target=target
    )
    config = coreml.OpPalettizerConfig(mode="unique", weight_threshold=0)
    model = ct.models.MLModel(str(path), skip_model_load=True)
    small = coreml.palettize_weights(model, coreml.OptimizationConfig(global_config=config))
    small.save(str(tmp_path / "small.mlpackage"))
    program = Program(tmp_path / "small.mlpackage")
    assert [op.type for op in program.operations] == ["constexpr_lut_to_dense", "conv"]
    (name,) = (op.outputs[0][0] for op in program.operations[:1])
    assert torch.equal(program.constants[name], torch.from_numpy(weight))
    x = random(1, 30, 1, 2).half()
    (out,) = program({"x": x}).values()
    (expected,) = Program(path)({"x": x}).values()
    assert torch.equal(out, expected)


def test_palettes_of_groups_of_channels(ct, saved, tmp_path):
    from coremltools.optimize import coreml

    weight = random(32, 16, 1, 1).half().numpy()
    path = saved(
        lambda mb, x: mb.conv(x=x, weight=weight), (1, 16, 1, 2), dtype="fp16", target="iOS18"
    )
    config = coreml.OpPalettizerConfig(
        nbits=4, granularity="per_grouped_channel", group_size=8, weight_threshold=0
    )
    model = ct.models.MLModel(str(path), skip_model_load=True)
    small = coreml.palettize_weights(model, coreml.OptimizationConfig(global_config=config))
    small.save(str(tmp_path / "small.mlpackage"))
    program = Program(tmp_path / "small.mlpackage")
    got = program.constants[program.operations[0].outputs[0][0]]
    for group in range(0, 32, 8):  # 128 weights and 16 values of their own
        values = got[group : group + 8].unique()
        assert len(values) <= 16
    plain = coreml.decompress_weights(small)
    plain.save(str(tmp_path / "plain.mlpackage"))
    back = Program(tmp_path / "plain.mlpackage")
    assert torch.equal(got, back.constant(back.operations[-1], "weight"))


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
@pytest.mark.parametrize("mode", ["linear", "linear_symmetric"])
def test_weights_of_eight_bits(ct, saved, tmp_path, target, mode):
    from coremltools.optimize import coreml

    weight = random(16, 8, 3, 3).half().numpy() + np.float16(0.5)
    path = saved(
        lambda mb, x: mb.conv(x=x, weight=weight), (1, 8, 3, 3), dtype="fp16", target=target
    )
    config = coreml.OpLinearQuantizerConfig(mode=mode, weight_threshold=0)
    model = ct.models.MLModel(str(path), skip_model_load=True)
    small = coreml.linear_quantize_weights(model, coreml.OptimizationConfig(global_config=config))
    small.save(str(tmp_path / "small.mlpackage"))
    program = Program(tmp_path / "small.mlpackage")
    kind = "affine_dequantize" if target == "iOS16" else "blockwise_shift_scale"
    assert program.operations[0].type == f"constexpr_{kind}"
    got = program.constants[program.operations[0].outputs[0][0]].double()
    exact = torch.from_numpy(weight).double()
    low, high = exact.flatten(1).aminmax(dim=1)
    step = (high - low) / 255 if mode == "linear" else torch.maximum(-low, high) / 127
    error = (got - exact).flatten(1).abs().amax(1)
    assert (error <= 0.55 * step + 2e-3).all(), error / step
    assert (error > 0).all()


# What is not evaluated is an error


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda mb, x: mb.sin(x=x, name="wave"), r"operation sin \(wave\)"),
        (
            lambda mb, x: mb.conv(
                x=x, weight=WEIGHT, groups=2, pad_type="same", strides=[2, 1], name="wide"
            ),
            r"operation conv \(wide\): parameter pad_type = 'same'",
        ),
        (
            lambda mb, x: mb.slice_by_index(
                x=x, begin=[0, 0, 0, 0], end=[2, 4, 5, 6], stride=[1, 1, 1, 2]
            ),
            r"slice_by_index .*parameter stride = \[1, 1, 1, 2\]",
        ),
        (
            lambda mb, x: mb.concat(values=[x, x], axis=1, interleave=True),
            "concat .*parameter interleave = True",
        ),
        (
            lambda mb, x: mb.cond(
                pred=mb.const(val=True),
                _true_fn=lambda: mb.relu(x=x),
                _false_fn=lambda: mb.sigmoid(x=x),
            ),
            "cond .*nested blocks",
        ),
    ],
)
def test_the_unknown_is_named(saved, function, message):
    with pytest.raises(Unsupported, match=message):
        Program(saved(function, IMAGE))({"x": random(*IMAGE)})


def test_a_parameter_that_is_not_read_is_named(saved, monkeypatch):
    from casvit_kernels.export.coreml.mil import operations

    monkeypatch.setitem(operations.FUNCTIONS, "softmax", lambda a: a.tensor("x").softmax(1))
    program = Program(saved(lambda mb, x: mb.softmax(x=x, axis=0), (2, 3)))
    with pytest.raises(Unsupported, match=r"softmax .*: parameters \['axis'\]"):
        program({"x": random(2, 3)})


def test_a_result_of_another_shape_than_declared(saved, monkeypatch):
    from casvit_kernels.export.coreml.mil import operations

    monkeypatch.setitem(operations.FUNCTIONS, "relu", lambda a: a.tensor("x")[:1])
    program = Program(saved(lambda mb, x: mb.relu(x=x), (2, 3)))
    with pytest.raises(Unsupported, match=r"declares shape \(2, 3\), evaluates to \(1, 3\)"):
        program({"x": random(2, 3)})


def test_wrong_inputs(saved):
    program = Program(saved(lambda mb, x: mb.relu(x=x), (2, 3)))
    assert program.inputs == (("x", "multiArray", (2, 3)),)
    with pytest.raises(ValueError, match=r"inputs: expected \['x'\], got \['z'\]"):
        program({"z": random(2, 3)})
    with pytest.raises(ValueError, match=r"inputs: x: expected shape \(2, 3\), got \(3, 2\)"):
        program({"x": random(3, 2)})


def test_a_network_of_the_older_kind(ct, tmp_path):
    from coremltools.models import datatypes, neural_network

    builder = neural_network.NeuralNetworkBuilder(
        [("x", datatypes.Array(3))], [("out", datatypes.Array(3))]
    )
    builder.add_activation("relu", "RELU", "x", "out")
    path = tmp_path / "old.mlmodel"
    ct.models.MLModel(builder.spec, skip_model_load=True).save(str(path))
    with pytest.raises(ValueError, match="expected an ML program, got a neuralNetwork"):
        Program(path)
