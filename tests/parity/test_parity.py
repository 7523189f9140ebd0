"""Every backend against plain PyTorch in float64, and proof that these checks can fail.

The quick suite takes cases that cover every pair of dtype, layout, mode and shape; the long one all of
them, and with CASVIT_KERNELS_PARITY=long a long random sweep. A new backend joins by a line in
`casvit_kernels.testing.BACKENDS`.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import require_backend, require_native

from casvit_kernels import AdditiveTokenMixer, BackendUnavailable, FusedCATM, backends, testing
from casvit_kernels.backends import cpu

LONG = os.environ.get("CASVIT_KERNELS_PARITY") == "long"


def _cases():
    for backend in testing.BACKENDS:
        every = testing.cases(backend, long=LONG)
        quick = set(testing.cover(every))
        yield from (pytest.param(c, marks=() if c in quick else pytest.mark.long) for c in every)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_backend_agrees_with_float64(case):
    require_backend(case.backend)
    row = testing.check(case)
    assert row.passed, "\n".join(row.failures)


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
@pytest.mark.parametrize("choice", ["cover", pytest.param("cases", marks=pytest.mark.long)])
def test_every_instruction_set_of_this_cpu(name, choice):
    require_native()
    reason = cpu.instruction_sets().get(name, "not in this build")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    # The library reads the variable when it loads, so each needs a process of its own.
    wanted = "testing.cases('cpu')" if choice == "cases" else "testing.cover(testing.cases('cpu'))"
    script = (
        "import json\n"
        "from casvit_kernels import testing\n"
        "from casvit_kernels.backends import cpu\n"
        f"rows = [testing.verdict(case) for case in {wanted}]\n"
        "failures = [[str(r[:5]), r.failures] for r in rows if not r.passed]\n"
        "print(json.dumps([cpu.active_instruction_set(), len(rows), failures]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "CASVIT_KERNELS_CPU_ISA": name, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    active, count, failures = json.loads(done.stdout)
    assert active == name
    assert count >= 60
    assert failures == [], (
        f"again: CASVIT_KERNELS_CPU_ISA={name} casvit-kernels parity --backend cpu"
    )


# Proof that a fault is seen. Each of these computes the mixer with one thing wrong.


class ZeroedRegion(AdditiveTokenMixer):
    """The right result, but a region of it was never computed."""

    region = ...

    def forward(self, x):
        out = super().forward(x).clone()
        out[self.region] = 0
        return out


class LastRow(ZeroedRegion):
    region = (..., slice(-1, None), slice(None))


class LastColumn(ZeroedRegion):
    region = (..., slice(-1, None))


class LastChannel(ZeroedRegion):
    region = (slice(None), slice(-1, None))


class LastImage(ZeroedRegion):
    region = (slice(-1, None),)


class OnePixel(ZeroedRegion):
    region = (slice(-1, None), slice(None), slice(-1, None), slice(-1, None))


class WrongBorder(AdditiveTokenMixer):
    """The last convolution repeats the border of the last channel instead of padding it with 0."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=1)
        mixed = self.dwc(self.oper_q(q) + self.oper_k(k)) * v
        padded = F.pad(mixed, (1, 1, 1, 1))
        padded[:, -1] = F.pad(mixed[:, -1:], (1, 1, 1, 1), mode="replicate")[:, 0]
        return F.conv2d(padded, self.proj.weight, self.proj.bias, groups=x.shape[1])


class NoSpatialGate(AdditiveTokenMixer):
    """The spatial gate of k is its value for an empty input, everywhere."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=1)
        k = self.oper_k[1](0.5 * k)
        return self.proj(self.dwc(self.oper_q(q) + k) * v)


class NoChannelGate(AdditiveTokenMixer):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=1)
        q = 0.5 * self.oper_q[0](q)
        return self.proj(self.dwc(q + self.oper_k(k)) * v)


class MeansOfTheFirstImage(AdditiveTokenMixer):
    """The channel gate of every image is that of the first."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=1)
        z = self.oper_k[0](k)
        k = z * self.oper_k[1].block(z[:1])
        return self.proj(self.dwc(self.oper_q(q) + k) * v)


class SwappedGates(AdditiveTokenMixer):
    def forward(self, x):
        k, q, v = self.qkv(x).chunk(3, dim=1)
        return self.proj(self.dwc(self.oper_q(q) + self.oper_k(k)) * v)


class TransposedTaps(AdditiveTokenMixer):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=1)
        weight = self.dwc.weight.transpose(2, 3)
        mixed = F.conv2d(
            self.oper_q(q) + self.oper_k(k), weight, self.dwc.bias, padding=1, groups=x.shape[1]
        )
        return self.proj(mixed * v)


class WrongEps(AdditiveTokenMixer):
    """BatchNorm with an eps of 1e-3 instead of 1e-5."""

    def __init__(self, *args):
        super().__init__(*args)
        self.oper_q[0].block[1].eps = 1e-3


class OtherLayout(AdditiveTokenMixer):
    def forward(self, x):
        out = super().forward(x)
        if out.is_contiguous():
            return out.contiguous(memory_format=torch.channels_last)
        return out.contiguous()


class OverwritesInput(AdditiveTokenMixer):
    def forward(self, x):
        out = super().forward(x)
        x.detach()[-1, -1, -1, -1] += 1
        return out


class OverwritesParameter(AdditiveTokenMixer):
    def forward(self, x):
        out = super().forward(x)
        self.proj.bias.data[0] *= 2
        return out


class ReadsUnwritten(AdditiveTokenMixer):
    """Trusts that fresh memory is zero."""

    def forward(self, x):
        return super().forward(x) + 0 * torch.empty_like(x)


class ReadsStaleScratch(AdditiveTokenMixer):
    """Reads a little of what an earlier call left behind."""

    kept = 0.0

    def forward(self, x):
        out = super().forward(x) + 0 * self.kept
        self.kept = x.detach().flatten()[-1]
        return out


class Unrepeatable(AdditiveTokenMixer):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls * torch.finfo(x.dtype).eps)


class DetachedBias(AdditiveTokenMixer):
    """One parameter gets no gradient."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=1)
        mixed = self.dwc(self.oper_q(q) + self.oper_k(k)) * v
        bias = self.proj.bias.detach()
        return F.conv2d(mixed, self.proj.weight, bias, padding=1, groups=x.shape[1])


class HalfGradient(AdditiveTokenMixer):
    """The right result; the gradient leaves out one of two ways to k."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=1)
        z = self.oper_k[0](k)
        k = z * self.oper_k[1].block(z.detach())
        return self.proj(self.dwc(self.oper_q(q) + k) * v)


class BiasedVariance(AdditiveTokenMixer):
    """Running variance without Bessel's correction."""

    def forward(self, x):
        norm = self.oper_k[0].block[1]
        old = 0.9 * norm.running_var
        out = super().forward(x)
        if norm.training:
            n = x.numel() / x.shape[1]
            norm.running_var.data.copy_(old + (norm.running_var - old) * (n - 1) / n)
        return out


class ForgetsCount(AdditiveTokenMixer):
    def forward(self, x):
        out = super().forward(x)
        self.oper_q[0].block[1].num_batches_tracked.zero_()
        return out


class Truncated(AdditiveTokenMixer):
    """Computed in float32, but rounded towards zero when it is stored."""

    def forward(self, x):
        wide = AdditiveTokenMixer(x.shape[1], self.qkv.bias is not None).eval()
        wide.load_state_dict(self.state_dict())
        return _truncate(wide(x.float()))


class Offset(AdditiveTokenMixer):
    """A little is added everywhere: far below the largest error, but always to one side."""

    def forward(self, x):
        out = super().forward(x)
        return out + 0.004 * out.square().mean().sqrt()


def _truncate(t):
    bits = t.contiguous().view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)


def _check(mixer, case):
    return testing.check(case, lambda c: mixer(c.shape[1], c.attn_bias))


def _case(dtype=torch.float32, mode="eval", shape=(2, 33, 7, 7), layout="contiguous"):
    return testing.Case("reference", dtype, layout, mode, shape)


EVERYWHERE = [
    LastRow,
    LastColumn,
    LastChannel,
    LastImage,
    OnePixel,
    WrongBorder,
    NoSpatialGate,
    NoChannelGate,
    MeansOfTheFirstImage,
    SwappedGates,
    TransposedTaps,
    OtherLayout,
    OverwritesInput,
    OverwritesParameter,
    ReadsUnwritten,
    ReadsStaleScratch,
    Unrepeatable,
]


def _faults():
    """Each fault in each dtype and at each of two shapes; quick: one of the six in turn."""
    shapes = [(2, 33, 7, 7), (3, 3, 13, 9)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for i, fault in enumerate(EVERYWHERE):
        for j, (dtype, shape) in enumerate(itertools.product(dtypes, shapes)):
            marks = () if j == i % 6 else pytest.mark.long
            yield pytest.param(
                fault, dtype, shape, marks=marks, id=f"{fault.__name__}-{dtype}-{shape}"
            )


@pytest.mark.parametrize(("fault", "dtype", "shape"), list(_faults()))
def test_a_fault_is_seen(fault, dtype, shape):
    case = _case(dtype, shape=shape)
    assert _check(AdditiveTokenMixer, case).passed
    assert not _check(fault, case).passed


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_a_fault_is_seen_in_every_layout(layout):
    case = _case(torch.bfloat16, layout=layout)
    assert _check(AdditiveTokenMixer, case).passed
    assert not _check(LastRow, case).passed
    assert not _check(OtherLayout, case).passed


@pytest.mark.parametrize("mode", ["frozen", "train"])
@pytest.mark.parametrize("fault", [DetachedBias, HalfGradient, LastRow], ids=lambda f: f.__name__)
def test_a_wrong_gradient_is_seen(fault, mode):
    for dtype in (torch.float32, torch.bfloat16):
        row = _check(fault, _case(dtype, mode))
        assert any(text.startswith("grad ") for text in row.failures)


@pytest.mark.parametrize("fault", [BiasedVariance, ForgetsCount], ids=lambda f: f.__name__)
def test_wrong_running_statistics_are_seen(fault):
    row = _check(fault, _case(mode="train"))
    assert row.failures
    assert all("running_var" in f or "num_batches_tracked" in f for f in row.failures)


def test_a_wrong_eps_is_seen():
    assert not _check(WrongEps, _case()).passed


@pytest.mark.parametrize("fault", [Truncated, Offset], ids=lambda f: f.__name__)
def test_a_bias_is_seen_where_every_element_is_within_bounds(fault):
    row = _check(fault, _case(torch.bfloat16, shape=(2, 512, 7, 7)))
    assert row.ratio <= testing.FACTOR
    assert not row.passed


def test_a_nan_fails():
    class Nan(AdditiveTokenMixer):
        def forward(self, x):
            return super().forward(x) * torch.nan

    row = _check(Nan, _case())
    assert not row.passed


def test_more_accurate_than_pytorch_passes():
    class Wide(AdditiveTokenMixer):
        def forward(self, x):
            wide = AdditiveTokenMixer(x.shape[1], self.qkv.bias is not None).double().eval()
            wide.load_state_dict(self.state_dict())
            return wide(x.double()).to(x.dtype)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        row = _check(Wide, _case(dtype))
        assert row.passed
        assert row.ratio < 1


def test_poison_reaches_fresh_memory_and_goes_away():
    before = torch.utils.deterministic.fill_uninitialized_memory
    with testing.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is before
    with pytest.raises(RuntimeError, match="inside"), testing.poisoned():
        raise RuntimeError("inside")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_hold_the_values_and_are_what_they_say(layout):
    values = torch.randn(1, 3, 5, 4).expand(2, 3, 5, 4)
    view, buffer = testing.lay_out(values, layout)
    assert torch.equal(view, values)
    assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert buffer.isnan().any().item() == (layout.split()[0] in ("sliced", "strided"))
    assert view.is_contiguous() == (layout == "contiguous")
    assert view.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_run_gives_a_row_for_each_case_and_reports_progress():
    seen = []
    rows = testing.run(
        "reference",
        dtypes=[torch.float16],
        modes=["eval"],
        progress=lambda done, total: seen.append((done, total)),
    )
    todo = testing.cases("reference", dtypes=[torch.float16], modes=["eval"])
    assert [r[:1] + r[2:5] for r in rows] == [(c.backend, *c[2:5]) for c in todo]
    assert {r.dtype for r in rows} == {"float16"}
    assert seen == [(i + 1, len(todo)) for i in range(len(todo))]


def test_run_reports_a_crash_as_a_failed_row(monkeypatch):
    def crash(self, x):
        raise RuntimeError("out of order")

    monkeypatch.setattr(FusedCATM, "forward", crash)
    rows = testing.run("reference", dtypes=[torch.float16], modes=["eval"])
    assert rows
    assert all(row.failures == ("RuntimeError: out of order",) for row in rows)


def test_cases_are_the_same_for_the_same_seed_and_long_adds_to_them():
    assert testing.cases("cpu", seed=3) == testing.cases("cpu", seed=3)
    assert testing.cases("cpu", seed=3) != testing.cases("cpu", seed=4)
    assert len(testing.cases("cpu", long=True)) > 2 * len(testing.cases("cpu"))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"backend: expected one of .*reference.*got 'metal'"):
        testing.run("metal")
    with pytest.raises(ValueError, match=r"dtypes: 'cpu' computes .*got torch.int8"):
        testing.cases("cpu", dtypes=[torch.int8])
    with pytest.raises(ValueError, match=r"modes: expected some of eval.*got 'test'"):
        testing.cases("cpu", modes=["test"])
    with pytest.raises(ValueError, match="layout: expected one of contiguous"):
        testing.lay_out(torch.ones(1, 1, 1, 1), "diagonal")


def test_a_backend_that_cannot_run_says_why():
    unusable = [s for s in backends() if not s.usable and s.name in testing.BACKENDS]
    if not unusable:
        pytest.skip("every checked backend is usable here")
    with pytest.raises(BackendUnavailable, match="cannot run here"):
        testing.run(unusable[0].name)


def test_real_cases_are_the_mixers_of_the_models():
    found = testing.real_cases("cpu", 2, device="cuda")
    shapes = {case.shape for case in found}
    assert {(2, 48, 56, 56), (2, 48, 96, 96), (2, 220, 7, 7), (2, 512, 12, 12)} <= shapes
    assert len(shapes) == 30  # 16 mixers, of which one has the shape of another, at two inputs
    assert len(found) == 30 * 3 * 2 * len(testing.MODES)
    assert {case.device for case in found} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_of_a_real_shape_can_be_judged(dtype):
    """Not by luck: in float32 no ReLU input is near 0, in float16 no sum overflows."""
    case = _case(dtype, "train", (2, 48, 56, 56))
    assert _check(AdditiveTokenMixer, case).passed
    assert not _check(HalfGradient, case).passed


def test_a_backend_is_not_checked_where_it_does_not_compute():
    require_native()
    with pytest.raises(BackendUnavailable, match="it computes on the CPU"):
        testing.run("cpu", device="cuda")
