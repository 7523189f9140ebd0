"""The CPU kernels of the training phases against the same phases in float64.

A phase may err at most four times as much as it does in float32 PyTorch.
"""

import itertools
import math

import phases
import pytest
import torch
import torch.nn.functional as F
from conftest import require_native, using_instruction_set
from test_phases import EPS, weights

from casvit_kernels.backends import cpu
from casvit_kernels.ops.mixer import cpu as kernels
from casvit_kernels.ops.mixer.weights import flatten, unflatten

OPS = torch.ops.casvit_kernels
LANES = {"portable": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16, "amx": 16}
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 7),
    (3, 33, 13, 9),
    (2, 48, 56, 56),
    (5, 220, 7, 7),
    (1, 512, 7, 7),
]
SHAPE = (3, 33, 13, 9)
FACTOR = 4
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(autouse=True)
def _native_kernels():
    require_native()


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def instruction_set(request):
    """Each one in turn that this CPU has."""
    with using_instruction_set(request.param):
        yield request.param


def cpu_project(x, weight, bias, dtype):
    planes = torch.full((kernels.floats("qkv", x.shape),), torch.nan)
    OPS.cpu_project(x, weight, bias, dtype, planes)
    return planes


def cpu_backward_combine(grad, planes, *arguments):
    b, c, height, width = grad.shape
    grad_qkv = torch.full((b * height * width, 3 * c), torch.nan)
    grad_sum = torch.full((kernels.floats("grad_sum", grad.shape),), torch.nan)
    found = OPS.cpu_backward_combine(grad, planes, *arguments, grad_qkv, grad_sum)
    return (grad_qkv, grad_sum, *found)


class Problem:
    """A mixer, its input, and the arguments of every phase; float32 as the kernels take it."""

    def __init__(self, shape, affine=True, dtype=torch.float32, memory_format=CONTIGUOUS):
        B, C, H, W = self.shape = shape
        self.w = weights(C, bias=affine, affine=affine)
        self.x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
        self.grad = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
        self.planes = cpu_project(self.x, self.w.qkv_weight, self.w.qkv_bias, torch.float32)
        self.qkv = from_planes(self.planes, shape)
        mixed = phases.mix(self.qkv, self.w, phases.statistics(self.qkv, self.w) + 0.1, EPS)
        self.statistics = (phases.statistics(self.qkv, self.w) + 0.1).contiguous()
        self.spatial, self.channel = mixed.spatial.contiguous(), mixed.channel
        self.pixel, self.shift = torch.randn(B, 2, H, W), torch.randn(2, B, C)
        self.logit, self.grad_sum = torch.randn(B, 2, H, W), torch.randn(shape)
        self.coefficients = torch.randn(2, 3, C)

    @property
    def arguments(self):
        return (*flatten(self.w), *EPS)


def from_planes(planes, shape):
    """(3, B, C, H, W) of what cpu_project returns; asserts that borders and padding are zero."""
    B, C, H, W = shape
    lanes = LANES[cpu.active_instruction_set()]
    blocks = -(-C // lanes)
    plane = (H + 2) * (W + 2) * lanes
    padded = planes.view(B, 3, blocks, -1)[..., :plane].reshape(B, 3, blocks, H + 2, W + 2, lanes)
    channels = padded.permute(1, 0, 2, 5, 3, 4).flatten(2, 3)
    assert torch.equal(
        channels.count_nonzero(), channels[:, :, :C, 1:-1, 1:-1].contiguous().count_nonzero()
    )
    return channels[:, :, :C, 1:-1, 1:-1].contiguous()


def from_blocks(flat, shape):
    """(B, C, H, W) of a gradient at q2 + k2."""
    B, C, H, W = shape
    lanes = LANES[cpu.active_instruction_set()]
    return flat.view(B, -1, H, W, lanes).permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :C]


def to_blocks(t):
    B, C, H, W = t.shape
    lanes = LANES[cpu.active_instruction_set()]
    padded = torch.zeros(B, -(-C // lanes) * lanes, H, W)
    padded[:, :C] = t
    return padded.view(B, -1, lanes, H, W).permute(0, 1, 3, 4, 2).contiguous().flatten()


def from_rows(rows, shape):
    """(3, B, C, H, W) of gradients at q, k and v."""
    B, C, H, W = shape
    return rows.view(B, H, W, 3, C).permute(3, 0, 4, 1, 2)


# Each returns its results as plain tensors, in the order of the phase in phases.py.


def kernel_project(p):
    planes = cpu_project(p.x, p.w.qkv_weight, p.w.qkv_bias, torch.float32)
    return (from_planes(planes, p.shape),)


def kernel_statistics(p):
    return (OPS.cpu_statistics(p.planes, p.shape, *p.arguments),)


def kernel_mix(p):
    return OPS.cpu_mix(p.x, p.planes, *p.arguments, p.statistics, torch.float32)


def kernel_combine(p):
    found = cpu_backward_combine(p.grad, p.planes, *p.arguments, p.spatial, p.channel)
    grad_v = from_rows(found[0], p.shape)[2]
    return (grad_v, from_blocks(found[1], p.shape), *found[2:])


def kernel_gate(p):
    return OPS.cpu_backward_gate(
        p.planes, p.shape, *p.arguments, p.statistics, p.spatial, p.pixel, p.shift
    )


def kernel_depthwise(p):
    B, C, H, W = p.shape
    rows = torch.full((B * H * W, 3 * C), torch.nan)
    grads = OPS.cpu_backward_depthwise(
        *(p.planes, p.shape, *p.arguments, p.statistics, p.spatial, p.channel, p.shift, p.logit),
        *(p.coefficients, to_blocks(p.grad_sum), rows),
    )
    found = from_rows(rows, p.shape)
    assert found[2].isnan().all()  # v's part is backward_combine's
    return (found[:2], *grads)


# The same in plain PyTorch; `a` turns an argument into the dtype to compute in.


def plain_project(p, a):
    return (phases.project(a(p.x), a(p.w)),)


def plain_statistics(p, a):
    return (phases.statistics(a(p.qkv), a(p.w)),)


def plain_mix(p, a):
    return phases.mix(a(p.qkv), a(p.w), a(p.statistics), EPS)


def plain_combine(p, a):
    found = phases.backward_combine(a(p.grad), a(p.qkv), a(p.w), a(p.spatial), a(p.channel))
    return (found.grad_qkv[2], *found[1:])


def plain_gate(p, a):
    return phases.backward_gate(
        a(p.qkv), a(p.w), a(p.statistics), EPS, a(p.spatial), a(p.pixel), a(p.shift)
    )


def plain_depthwise(p, a):
    grad_qkv = torch.zeros_like(a(p.qkv))
    grads = phases.backward_depthwise(
        *(a(p.qkv), a(p.w), a(p.statistics), EPS, a(p.spatial), a(p.channel), a(p.shift)),
        *(a(p.logit), a(p.coefficients), a(p.grad_sum), grad_qkv),
    )
    return (grad_qkv[:2], *grads)


PHASES = {
    "project": (kernel_project, plain_project),
    "statistics": (kernel_statistics, plain_statistics),
    "mix": (kernel_mix, plain_mix),
    "combine": (kernel_combine, plain_combine),
    "gate": (kernel_gate, plain_gate),
    "depthwise": (kernel_depthwise, plain_depthwise),
}


def caster(dtype):
    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype)
        flat = flatten(value)
        return unflatten(tuple(t if t is None else t.to(dtype) for t in flat))

    return cast


def assert_as_precise(p, phase):
    kernel, plain = PHASES[phase]
    found = kernel(p)
    truth, single = plain(p, caster(torch.float64)), plain(p, caster(torch.float32))
    assert len(found) == len(truth)
    for i, (f, t, s) in enumerate(zip(found, truth, single, strict=True)):
        assert f.shape == t.shape, f"{phase} {i}"
        assert f.dtype == torch.float32
        scale = t.abs().max().item()
        error = (f.double() - t).abs().max().item()
        # Of a few values PyTorch's may all be exact by luck: its error counts as one ulp at least.
        ulp = torch.finfo(torch.float32).eps * scale
        allowed = FACTOR * max((s.double() - t).abs().max().item(), ulp)
        assert error <= allowed, f"{phase} {i}: error {error:.3g} of {scale:.3g}, {allowed:.3g}"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_precise_as_pytorch(shape, phase, instruction_set):
    assert_as_precise(Problem(shape), phase)


@pytest.mark.parametrize("phase", PHASES)
def test_without_the_optional_weights(phase):
    assert_as_precise(Problem(SHAPE, affine=False), phase)


@pytest.mark.parametrize("phase", ["project", "combine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
@pytest.mark.parametrize("shape", [SHAPE, (2, 48, 8, 8), (2, 5, 3, 2)], ids=str)
def test_any_input(shape, layout, dtype, phase, instruction_set):
    p = Problem(shape, dtype=dtype)
    for name in ("x", "grad"):
        t = getattr(p, name)
        if layout == "channels_last":
            t = t.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            B, C, H, W = shape
            t = torch.full((B, C + 2, 2 * H, W + 3), torch.nan, dtype=dtype)[
                :, 1:-1, ::2, 2:-1
            ].copy_(t)
        elif layout == "expanded":
            t = t[..., :1].expand(shape)
        setattr(p, name, t)
    assert_as_precise(p, phase)


@pytest.mark.parametrize("shape", [(1, 20, 160, 130), (1, 4, 3, 300)], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_maps_cut_into_bands(shape, phase):
    """Large maps are worked on piece by piece."""
    assert_as_precise(Problem(shape), phase)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("shape", [SHAPE, (1, 20, 40, 30), (5, 220, 7, 7)], ids=str)
def test_the_same_bits_for_any_number_of_threads(shape, phase):
    p = Problem(shape)
    kernel, _ = PHASES[phase]
    torch.set_num_threads(1)
    expected = kernel(p)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for f, e in zip(kernel(p), expected, strict=True):
            assert torch.equal(f, e)


def test_a_small_variance_beside_a_large_mean(instruction_set):
    """The deviation of the convolution is 1e-4 of its mean, far from the zero borders' values."""
    p = Problem((4, 5, 20, 21))
    with torch.no_grad():
        for g in (p.w.q, p.w.k):
            g.depthwise_weight.zero_()[:, :, 1, 1] = 1.0
    p.x.mul_(1e-4).add_(1.0)
    p.w.qkv_weight.copy_(torch.eye(5).repeat(3, 1).view(15, 5, 1, 1))
    p.w.qkv_bias.zero_()
    p.planes = cpu_project(p.x, p.w.qkv_weight, p.w.qkv_bias, torch.float32)
    p.qkv = from_planes(p.planes, p.shape)
    (found,) = kernel_statistics(p)
    (truth,) = plain_statistics(p, caster(torch.float64))
    torch.testing.assert_close(found[:, 1].double(), truth[:, 1], rtol=2e-6, atol=0)
    torch.testing.assert_close(found[:, 0].double(), truth[:, 0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_out_is_of_the_dtype_and_layout_asked_for(dtype, memory_format):
    p = Problem((2, 20, 6, 5), memory_format=memory_format)
    out, *small = OPS.cpu_mix(p.x, p.planes, *p.arguments, p.statistics, dtype)
    expected, *expected_small = plain_mix(p, caster(torch.float64))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
    for f, e in zip(small, expected_small, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-5)


def test_sums_over_many_channels_lose_no_digit(instruction_set):
    shape = (1, 2048, 7, 7)
    x, weight = torch.randn(shape), torch.randn(3 * 2048, 2048, 1, 1) / 45
    found = from_planes(cpu_project(x, weight, None, torch.float32), shape)[:, 0].flatten(0, 1)
    truth = F.conv2d(x.double(), weight.double())[0]
    plain = (F.conv2d(x, weight)[0].double() - truth).abs().max().item()
    assert (found.double() - truth).abs().max().item() <= plain


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST, "strided"], ids=str)
@pytest.mark.parametrize("shape", [(2, 48, 9, 7), (3, 33, 13, 9), (2, 1, 1, 1)], ids=str)
def test_the_product_in_bfloat16(shape, layout, instruction_set):
    p = Problem(shape, dtype=torch.bfloat16)
    half = unflatten(tuple(t.bfloat16() for t in flatten(p.w)))
    planes = cpu_project(as_laid_out(p.x, layout), half.qkv_weight, half.qkv_bias, torch.bfloat16)
    torch.testing.assert_close(
        from_planes(planes, p.shape).double(),
        phases.project(p.x.double(), caster(torch.float64)(half)),
        rtol=1e-5,
        atol=1e-5,
    )


def as_laid_out(t, layout):
    """The same values: of a memory format, or with holes between all of them."""
    if layout != "strided":
        return t.contiguous(memory_format=layout)
    B, C, H, W = t.shape
    holes = torch.full((B, C, 2 * H, 2 * W), torch.nan, dtype=t.dtype)
    return holes[:, :, ::2, ::2].copy_(t)


def product_gradients(grad, x, weight):
    """Of x and of the weight, as matrices of the dtype of the operands."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    return grad @ weight.flatten(1), grad.t() @ rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST, "strided"], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 3, 1, 7), (3, 33, 13, 9), (2, 48, 29, 28), (5, 220, 7, 7), (1, 512, 7, 7)],
    ids=str,
)
def test_gradients_of_the_product(shape, layout, dtype, instruction_set):
    """As exact as PyTorch's; in bf16, where the CPU multiplies that, of rounded operands."""
    B, C, H, W = shape
    x = as_laid_out(torch.randn(shape).to(dtype), layout)
    grad, weight = torch.randn(B * H * W, 3 * C), torch.randn(3 * C, C, 1, 1) / C**0.5
    found = OPS.cpu_project_backward(grad, x, weight, dtype, True, True, True)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    of_x = found[0].permute(0, 2, 3, 1).reshape(-1, C)
    rounds = dtype == torch.bfloat16 and instruction_set in ("avx512_bf16", "amx")
    used = torch.bfloat16 if rounds else torch.float32  # operands, but no sums
    operands = [t.to(used).float() for t in (grad, x, weight)]
    truth = (*product_gradients(*(t.double() for t in operands)), grad.double().sum(0))
    plain = (*product_gradients(*operands), grad.sum(0))
    singles = (plain[0].to(dtype), *plain[1:])
    names = ("x", "weight", "bias")
    for name, f, t, s in zip(names, (of_x, *found[1:]), truth, singles, strict=True):
        error = (f.double() - t).abs().max().item()
        ulp = torch.finfo(torch.float32).eps * t.abs().max().item()
        allowed = FACTOR * max((s.double() - t).abs().max().item(), ulp)
        assert error <= allowed, f"{name}: error {error:.3g}, {allowed:.3g}"


def test_a_part_of_the_products_gradients(instruction_set):
    """What is not asked for is not computed, and what is has the same bits."""
    x, grad, weight = torch.randn(2, 20, 5, 7), torch.randn(70, 60), torch.randn(60, 20, 1, 1)
    every = OPS.cpu_project_backward(grad, x, weight, torch.float32, True, True, True)
    for needed in itertools.product((False, True), repeat=3):
        found = OPS.cpu_project_backward(grad, x, weight, torch.float32, *needed)
        for f, e, need in zip(found, every, needed, strict=True):
            assert torch.equal(f, e) if need else f.numel() == 0


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 0, 3)], ids=str)
def test_nothing_to_do(shape):
    B, C, H, W = shape
    w, x = weights(C), torch.randn(shape)
    arguments = (*flatten(w), *EPS)
    planes = cpu_project(x, w.qkv_weight, w.qkv_bias, torch.float32)
    statistics = torch.ones(2, 2, C)
    assert OPS.cpu_statistics(planes, shape, *arguments).shape == (2, 2, C)
    mixed = OPS.cpu_mix(x, planes, *arguments, statistics, torch.float32)
    assert [tuple(t.shape) for t in mixed] == [shape, (B, 2, H, W), (2, B, C), (2, B, C)]
    b1 = cpu_backward_combine(x, planes, *arguments, mixed[1], mixed[3])
    b2 = OPS.cpu_backward_gate(planes, shape, *arguments, statistics, *mixed[1:2], b1[2], b1[3])
    b3 = OPS.cpu_backward_depthwise(
        *(planes, shape, *arguments, statistics, mixed[1], mixed[3], b1[3], b2[0]),
        *(torch.ones(2, 3, C), b1[1], b1[0]),
    )
    for t in (*b1[4:], *b2[1:], *b3):
        assert t.count_nonzero() == 0
    assert b1[0].shape == (B * H * W, 3 * C)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": torch.zeros(7)}, "qkv: expected .* elements, got 7"),
        ({"spatial": torch.zeros(3)}, "spatial: expected .* elements, got 3"),
        ({"statistics": torch.zeros(2, 2, 33).double()}, "statistics: expected float32"),
        ({"shift": torch.zeros(33, 3, 2).permute(2, 1, 0)}, "shift: expected a contiguous"),
        ({"shape": (3, 34, 13, 9)}, "shape: expected 33 channels, got 34"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_refused(change, message):
    p = Problem(SHAPE)
    vars(p).update(change)
    with pytest.raises(RuntimeError, match=message):
        kernel_gate(p)


def product(x, weight):
    """The kernel's product, PyTorch's and the true one, (B, 3 C, H, W) each."""
    found = from_planes(cpu_project(x, weight, None, torch.float32), x.shape)
    found = found.transpose(0, 1).flatten(1, 2)
    return found.double(), F.conv2d(x, weight).double(), F.conv2d(x.double(), weight.double())


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("C", [56, 112, 220, 300, 512])
def test_the_product_is_as_exact_as_float32(instruction_set, C, memory_format):
    x = torch.randn(2, C, 9, 7).contiguous(memory_format=memory_format)
    found, plain, truth = product(x, torch.randn(3 * C, C, 1, 1) / C**0.5)
    assert (found - truth).abs().max() <= 1.5 * (plain - truth).abs().max()


@pytest.mark.parametrize(("C", "channel"), [(112, 70), (130, 128), (132, 131), (272, 5)])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_one_huge_number_does_not_blur_the_others(instruction_set, where, C, channel):
    """What it is multiplied with is zero: in float32 it leaves no trace."""
    x, weight = torch.randn(2, C, 9, 7), torch.randn(3 * C, C, 1, 1) / C**0.5
    x[:, channel] = 1e6 if where == "x" else 0.0
    weight[:, channel] = 1e6 if where == "weight" else 0.0
    found, plain, truth = product(x, weight)
    assert (found - truth).abs().max() <= 1.5 * (plain - truth).abs().max()


def one(C):
    return torch.ones(C).index_fill_(0, torch.tensor(3), 1e5)


@pytest.mark.parametrize("scale", [one, lambda C: torch.randn(C).exp()], ids=["one", "all"])
def test_channels_may_be_of_any_scale_that_the_weights_make_up_for(instruction_set, scale):
    C = 112
    scale = scale(C).view(1, C, 1, 1)
    x, weight = torch.randn(2, C, 9, 7) * scale, torch.randn(3 * C, C, 1, 1) / C**0.5 / scale
    found, plain, truth = product(x, weight)
    assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max()


def test_one_weight_may_be_huge(instruction_set):
    C = 112
    x, weight = torch.randn(2, C, 9, 7), torch.randn(3 * C, C, 1, 1) / C**0.5
    weight[17, 5] = 1e6
    found, plain, truth = product(x, weight)
    others = torch.arange(3 * C) != 17
    error = (found - truth)[:, others].abs().max()
    assert error <= 1.5 * (plain - truth)[:, others].abs().max()


@pytest.mark.parametrize("sizes", [(1e-16, 1e-16), (1e24, 1e24), (1e-33, 1e20), (1e20, 1e-33)])
def test_products_near_the_ends_of_the_range(instruction_set, sizes):
    C = 64
    x, weight = torch.randn(1, C, 8, 8) * sizes[0], torch.randn(3 * C, C, 1, 1) * sizes[1]
    if sizes[0] * sizes[1] > 1:
        x[:, 32:] = 0.0
        weight[:, :32] = 0.0  # the products would be infinite
    found, _, truth = product(x, weight)
    torch.testing.assert_close(found, truth, rtol=0, atol=float(1e-5 * truth.abs().max()))


@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("factor", [0.0, 1e-33, 1e33, torch.inf, torch.nan])
def test_numbers_at_the_ends_of_the_range_and_beyond(instruction_set, factor, where):
    C = 64
    x, weight = torch.randn(1, C, 8, 8), torch.randn(3 * C, C, 1, 1)
    channels = slice(None) if math.isfinite(factor) else slice(7, 8)
    if where == "x":
        x[:, channels, 3, 4] *= factor
    else:
        weight[20, channels] *= factor
    found, plain, truth = product(x, weight)
    assert torch.equal(found.isfinite(), plain.isfinite())
    error = (found - truth).abs().nan_to_num(0.0)
    touched = torch.zeros(error.shape, dtype=torch.bool)
    (touched[..., 3, 4] if where == "x" else touched[:, 20]).fill_(True)
    assert error[~touched].max() <= 1e-4
    # The last digits of 1e-33 are too small for float32's normal range.
    assert error[touched].max() <= (1e-3 * factor if 0 < factor < torch.inf else 0.0)
