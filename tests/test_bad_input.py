"""Bad input to FusedCATM and catm: a clear error, and nothing is changed."""

import copy
import re

import pytest
import torch
from conftest import require_backend
from mixers import filled

from casvit_kernels import BackendUnavailable, FusedCATM, catm, use_backend
from casvit_kernels.ops.mixer.weights import GateWeights, MixerWeights


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    require_backend(request.param)
    return request.param


@pytest.fixture(params=["eval", "train"])
def mixer(request, backend):
    return filled(FusedCATM(4, backend=backend)).train(request.param == "train")


def bits(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def refused(error, message, mixer, x):
    """The call raises, and neither the mixer nor x is changed; a good call still works after."""
    before, x_before = bits(mixer), copy.deepcopy(x)
    with pytest.raises(error, match=message) as caught:
        mixer(x)
    assert type(caught.value) is error
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name
    if isinstance(x, torch.Tensor) and x.device.type != "meta":
        assert torch.equal(x, x_before)
    assert mixer(torch.randn(2, 4, 3, 3)).isfinite().all()


@pytest.mark.parametrize("shape", [(4, 5, 5), (1, 2, 4, 5, 5), (4,), ()], ids=str)
def test_wrong_rank(mixer, shape):
    message = r"x: expected 4 dimensions \(B, C, H, W\), got shape " + re.escape(str(shape))
    refused(ValueError, message, mixer, torch.randn(shape))


@pytest.mark.parametrize("channels", [0, 1, 3, 5, 12])
def test_wrong_channels(mixer, channels):
    message = rf"x: expected 4 channels \(dim\) .* got {channels} in shape \(2, {channels}, 5, 6\)"
    refused(ValueError, message, mixer, torch.randn(2, channels, 5, 6))


def test_channels_last_by_mistake(mixer):
    refused(ValueError, r"x: expected 4 channels .* got 8", mixer, torch.randn(2, 8, 8, 4))


@pytest.mark.parametrize("shape", [(2, 4, 0, 3), (2, 4, 3, 0)], ids=str)
def test_empty_maps(mixer, shape):
    message = r"x: expected H >= 1 and W >= 1, got shape " + re.escape(str(shape))
    refused(ValueError, message, mixer, torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_are_no_floats(mixer, dtype):
    message = f"x: expected a floating dtype, got {dtype}"
    refused(TypeError, message, mixer, torch.ones(2, 4, 5, 5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_dtypes_that_are_no_floats_under_autocast(mixer, dtype):
    with torch.autocast("cpu", torch.bfloat16):
        refused(TypeError, "x: expected a floating", mixer, torch.ones(2, 4, 5, 5).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_differs_from_the_parameters(mixer, dtype):
    message = f"x: expected the dtype of the parameters, torch.float32, got {dtype}.*autocast"
    refused(TypeError, message, mixer, torch.ones(2, 4, 5, 5, dtype=dtype))


@pytest.mark.parametrize("wide", ["x", "parameters"])
def test_float64_with_others_under_autocast(mixer, wide):
    x = torch.randn(2, 4, 5, 5)
    if wide == "x":
        x = x.double()
    else:
        mixer.double()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"x: expected the dtype .*autocast leaves float64 alone"),
    ):
        mixer(x)


def test_a_dtype_nobody_computes(backend):
    mixer = FusedCATM(4, backend=backend).eval()
    x = torch.ones(2, 4, 5, 5).to(torch.float8_e4m3fn)
    refused(TypeError, "x: expected .*got torch.float8_e4m3fn", mixer, x)


def test_another_device(mixer):
    x = torch.empty(2, 4, 5, 5, device="meta")
    refused(ValueError, "x: expected the device of the parameters, cpu, got meta", mixer, x)


@pytest.mark.parametrize("x", [None, [[1.0]], 3.0, "image"], ids=repr)
def test_no_tensor(mixer, x):
    message = f"x: expected a torch.Tensor, got {type(x).__name__}"
    refused(TypeError, message, mixer, x)


# Weights that differ among themselves

ARGUMENT = {  # by the part that holds it
    "dwc": "dwc_weight",
    "proj": "proj_weight",
    "oper_q.0.block.0": r"q\.depthwise_weight",
    "oper_q.0.block.1": r"q\.norm_weight",
    "oper_k.0.block.3": r"k\.spatial_weight",
    "oper_k.1.block.1": r"k\.channel_weight",
}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("part", ARGUMENT)
def test_one_weight_of_another_dtype(backend, part, dtype, used):
    mixer = filled(FusedCATM(4, backend=backend)).eval()
    x = torch.randn(2, 4, 5, 5)
    if used:  # its packed weights are out of date then
        mixer(x)
    mixer.get_submodule(part).to(dtype)
    before = bits(mixer)
    message = (
        rf"weights\.{ARGUMENT[part]}: expected the dtype of weights\.qkv_weight, torch\.float32, "
        rf"got {dtype} .*autocast"
    )
    with pytest.raises(TypeError, match=message):
        mixer(x)
    assert all(torch.equal(v, before[k]) for k, v in mixer.state_dict().items())
    mixer.float()
    assert mixer(x).isfinite().all()


@pytest.mark.parametrize("part", ARGUMENT)
def test_one_weight_of_another_dtype_under_autocast(backend, part):
    mixer = filled(FusedCATM(4, backend=backend)).eval()
    x = torch.randn(2, 4, 5, 5)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast:
        expected = mixer(x)
    mixer.get_submodule(part).to(torch.bfloat16)
    for _ in range(2):
        with autocast:
            torch.testing.assert_close(mixer(x), expected, rtol=0.1, atol=0.1)
        # Packed for autocast, but not for this.
        with pytest.raises(TypeError, match=rf"weights\.{ARGUMENT[part]}: expected the dtype"):
            mixer(x)
        with pytest.raises(TypeError, match="x: expected the dtype"):
            mixer(x.bfloat16())
    mixer.get_submodule(part).to(torch.float64)
    with autocast, pytest.raises(TypeError, match=rf"{ARGUMENT[part]}: .*float64 .*autocast casts"):
        mixer(x)


def test_weights_packed_under_autocast_do_not_serve_the_same_dtype_without(backend):
    mixer = filled(FusedCATM(4, backend=backend)).eval().bfloat16()
    mixer.proj.float()
    x = torch.randn(2, 4, 5, 5).bfloat16()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert mixer(x).isfinite().all()
        with pytest.raises(
            TypeError, match=r"weights\.proj_weight: .*bfloat16, got torch\.float32"
        ):
            mixer(x)


@pytest.mark.parametrize("part", ARGUMENT)
def test_one_weight_on_another_device(backend, part):
    mixer = filled(FusedCATM(4, backend=backend)).eval()
    mixer.get_submodule(part).to("meta")
    message = rf"{ARGUMENT[part]}: expected the device of weights\.qkv_weight, cpu, got meta"
    with pytest.raises(ValueError, match=message):
        mixer(torch.randn(2, 4, 5, 5))


# The constructor


@pytest.mark.parametrize("dim", [0, -1, 2.0, "8", None, True], ids=repr)
def test_dim(dim):
    message = rf"dim: expected a positive integer, got {re.escape(repr(dim))}"
    with pytest.raises(ValueError, match=message):
        FusedCATM(dim)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_proj_drop(p):
    with pytest.raises(
        ValueError, match=rf"proj_drop: expected a probability in \[0, 1\], got {p}"
    ):
        FusedCATM(4, proj_drop=p)


# Backends


def test_unknown_backend_lists_the_known():
    known = r"expected one of cpu, cuda, triton, reference, got 'metal'"
    with pytest.raises(ValueError, match=f"backend: {known}"):
        FusedCATM(4, backend="metal")
    with pytest.raises(ValueError, match=f"backend: {known}"):
        catm(torch.randn(1, 4, 3, 3), weights(), backend="metal")
    with pytest.raises(ValueError, match=rf"use_backend\(name\): {known}"), use_backend("metal"):
        pass


def test_unknown_backend_set_later(mixer):
    mixer.backend = "metal"
    before = bits(mixer)
    with pytest.raises(ValueError, match=r"backend: expected one of .* got 'metal'"):
        mixer(torch.randn(2, 4, 3, 3))
    assert all(torch.equal(v, before[k]) for k, v in mixer.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_do_it_says_why(name, training):
    mixer = filled(FusedCATM(4, backend=name)).train(training)
    before = bits(mixer)
    with pytest.raises(BackendUnavailable, match=f"backend='{name}' cannot serve.*float32 on cpu"):
        mixer(torch.randn(2, 4, 3, 3))
    assert all(torch.equal(v, before[k]) for k, v in mixer.state_dict().items())


# catm's weights


def weights(**changes):
    def gate():
        return GateWeights(
            torch.randn(4, 1, 3, 3),
            torch.randn(4),
            torch.randn(4),
            torch.randn(4),
            torch.randn(4),
            torch.rand(4) + 0.5,
            torch.randn(1, 4, 1, 1),
            torch.randn(4, 4, 1, 1),
        )

    q, k = gate(), gate()
    own = {k: v for k, v in changes.items() if k in MixerWeights._fields}
    of_q = {k: v for k, v in changes.items() if k in GateWeights._fields}
    return MixerWeights(
        torch.randn(12, 4, 1, 1),
        None,
        q._replace(**of_q),
        k,
        torch.randn(4, 1, 3, 3),
        torch.randn(4),
        torch.randn(4, 1, 3, 3),
        torch.randn(4),
    )._replace(**own)


WRONG_WEIGHTS = {
    "qkv_weight": torch.randn(8, 4, 1, 1),
    "qkv_bias": torch.randn(4),
    "dwc_weight": torch.randn(4, 1, 5, 5),
    "dwc_bias": torch.randn(3),
    "proj_weight": torch.randn(3, 1, 3, 3),
    "proj_bias": torch.randn(5),
    "depthwise_weight": torch.randn(4, 4, 3, 3),
    "depthwise_bias": torch.randn(2),
    "norm_weight": torch.randn(3),
    "norm_bias": torch.randn(5),
    "norm_mean": torch.randn(3),
    "norm_var": torch.rand(3),
    "spatial_weight": torch.randn(1, 3, 1, 1),
    "channel_weight": torch.randn(3, 4, 1, 1),
}


# With as many elements as the right one: kernels that count elements would read them as if they fitted.
SAME_NUMBER = {
    "dwc_weight": torch.randn(3, 3, 1, 4),
    "proj_weight": torch.randn(4, 1, 1, 9),
    "channel_weight": torch.randn(16, 1, 1, 1),
    "spatial_weight": torch.randn(4, 1, 1, 1),
    "norm_mean": torch.randn(4, 1),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_of_the_wrong_shape(backend, name):
    x = torch.randn(2, 4, 5, 5)
    catm(x, weights(), backend=backend)
    for wrong in (WRONG_WEIGHTS, SAME_NUMBER):
        if name in wrong:
            with pytest.raises(ValueError, match=rf"{name}: expected shape \(.*\), got \("):
                catm(x, weights(**{name: wrong[name]}), backend=backend)


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_of_the_wrong_dtype(backend, name):
    right = weights(qkv_bias=torch.randn(12))
    value = getattr(right, name) if name in MixerWeights._fields else getattr(right.q, name)
    with pytest.raises((TypeError, RuntimeError)):
        catm(torch.randn(2, 4, 5, 5), weights(**{name: value.long()}), backend=backend)


@pytest.mark.parametrize("name", ["norm_mean", "norm_var"])
def test_no_running_statistics(backend, name):
    with pytest.raises(ValueError, match=r"expected running statistics .*norm_mean.* got None"):
        catm(torch.randn(2, 4, 5, 5), weights(**{name: None}), backend=backend)
