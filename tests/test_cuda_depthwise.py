"""The depthwise convolution on tensor cores and its gradients, in the emulation, against float64."""

import pytest
import torch
import torch.nn.functional as F
from cuda_emulation import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

SHAPES = [(1, 4, 7, 8), (2, 9, 5, 3), (1, 3, 1, 1), (1, 20, 16, 13), (3, 1, 4, 2)]
DTYPES = [torch.bfloat16, torch.float16]


def rows(x):
    """(B, C, H, W) as the kernels read it: channels innermost, q, k and v, zeros up to 4 channels."""
    more = -x.shape[1] % 4
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, more))
    return torch.cat([pixels] * 3, -1).contiguous()


def run(what, dtype, height, x, out, taps=None, gradient=None, schedule=0):
    """Calls the probe. height: rows of a sweep."""
    qkv = rows(x)
    given = {"qkv": qkv}
    if taps is not None:
        given["taps"] = taps
    if gradient is not None:
        given["gradient"] = rows(gradient)
    buffers = [(n, t.data_ptr(), t.numel() * t.element_size(), False) for n, t in given.items()]
    buffers.append(("out", out.data_ptr(), out.numel() * 4, True))

    def pointer(name):
        return given[name].data_ptr() if name in given else 0

    build.module().depthwise(
        what,
        dtype is torch.float16,
        height,
        list(x.shape),
        qkv.data_ptr(),
        pointer("taps"),
        pointer("gradient"),
        out.data_ptr(),
        schedule,
        buffers,
    )


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def convolve(what, dtype, height, x, taps, schedule=0):
    """(B, C, H, W) float32 of the probe. taps: (C, 3, 3)."""
    b, c, h, w = x.shape
    out = torch.full((b, h, w, c + -c % 4), float("nan"))
    padded = F.pad(taps.reshape(c, 9), (0, 0, 0, -c % 4)).contiguous()
    run(what, dtype, height, x, out, padded, schedule=schedule)
    return out[..., :c].permute(0, 3, 1, 2)


def reference(x, taps):
    return F.conv2d(x.double(), taps.double()[:, None], padding=1, groups=x.shape[1])


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("height", [7, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_of_taps_that_the_dtype_holds(shape, dtype, height, schedule):
    x, taps = random(*shape, dtype=dtype), random(shape[1], 3, 3, seed=1).to(dtype).float()
    out = convolve("plain", dtype, height, x, taps, schedule)
    torch.testing.assert_close(out.double(), reference(x, taps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), list(zip(DTYPES, (4e-5, 1e-6), strict=True)), ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_words_hold_twice_the_mantissa(shape, dtype, tolerance):
    x, taps = random(*shape, dtype=dtype), random(shape[1], 3, 3, seed=1)
    expected = reference(x, taps)
    exact = (convolve("exact", dtype, 7, x, taps).double() - expected).abs().max()
    plain = (convolve("plain", dtype, 7, x, taps).double() - expected).abs().max()
    assert exact <= tolerance * expected.abs().max()
    assert plain > 10 * exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed(shape, dtype):
    """The gradient of the input: the same function with the taps turned round."""
    grad, taps = random(*shape, dtype=dtype), random(shape[1], 3, 3, seed=1).to(dtype).float()
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    reference(x, taps).backward(grad.double())
    out = convolve("plain", dtype, 4, grad, taps.flip(1, 2))
    torch.testing.assert_close(out.double(), x.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("height", [7, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_the_taps(shape, dtype, height, schedule):
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=2)
    c = shape[1]
    out = torch.zeros(c + -c % 4, 9, 2, 8)
    run("gradient", dtype, height, x, out, gradient=grad, schedule=schedule)
    taps = torch.zeros(c, 3, 3, dtype=torch.float64, requires_grad=True)
    F.conv2d(x.double(), taps[:, None], padding=1, groups=c).backward(grad.double())
    got = out.sum((2, 3))[:c].view(c, 3, 3).double()
    torch.testing.assert_close(got, taps.grad, rtol=1e-5, atol=1e-5)
