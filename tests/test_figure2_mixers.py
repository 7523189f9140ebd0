"""The other mixers of the paper's Figure 2: what they compute, and what they cost."""

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.mixers import (  # noqa: E402
    EfficientAdditiveAttention,
    SelfAttention,
    SeparableSelfAttention,
    macs,
    parameters,
)
from casvit_kernels import AdditiveTokenMixer, benchmark  # noqa: E402

MIXERS = {
    "self-attention": SelfAttention,
    "self-attention sdpa": lambda dim: SelfAttention(dim, fused=True),
    "separable": SeparableSelfAttention,
    "efficient additive": EfficientAdditiveAttention,
}


def made(name, dim=8):
    torch.manual_seed(0)
    return MIXERS[name](dim).double()


def tokens_of(x):
    """Lists of vectors, pixel by pixel."""
    return [x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])]


def loop_self_attention(m, x):
    tokens = tokens_of(x)
    rows = [m.qkv.weight @ t + m.qkv.bias for t in tokens]
    dim, size = x.shape[0], x.shape[0] // m.heads
    out = []
    for row in rows:
        mixed = []
        for head in range(m.heads):
            at = slice(head * size, (head + 1) * size)
            query = row[:dim][at]
            scores = [math.exp(query @ r[dim : 2 * dim][at] / math.sqrt(size)) for r in rows]
            values = [r[2 * dim :][at] for r in rows]
            mixed.append(sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores))
        out.append(m.proj.weight @ torch.cat(mixed) + m.proj.bias)
    return out


def loop_separable(m, x):
    weight, bias, dim = m.qkv.weight.flatten(1), m.qkv.bias, x.shape[0]
    tokens = tokens_of(x)
    scores = [math.exp(weight[0] @ t + bias[0]) for t in tokens]
    context = sum(
        s / sum(scores) * (weight[1 : dim + 1] @ t + bias[1 : dim + 1])
        for s, t in zip(scores, tokens, strict=True)
    )
    values = [(weight[dim + 1 :] @ t + bias[dim + 1 :]).clamp(min=0) for t in tokens]
    return [m.proj.weight.flatten(1) @ (context * v) + m.proj.bias for v in values]


def loop_efficient_additive(m, x):
    tokens = tokens_of(x)
    queries = [m.query(t) for t in tokens]
    queries = [q / q.norm() for q in queries]
    keys = [m.key(t) for t in tokens]
    keys = [k / k.norm() for k in keys]
    alpha = [(q @ m.weight[:, 0] / math.sqrt(x.shape[0])).item() for q in queries]
    length = math.sqrt(sum(a * a for a in alpha))
    whole = sum(a / length * q for a, q in zip(alpha, queries, strict=True))
    return [m.final(m.transform(k * whole) + q) for k, q in zip(keys, queries, strict=True)]


LOOPS = {
    "self-attention": loop_self_attention,
    "self-attention sdpa": loop_self_attention,
    "separable": loop_separable,
    "efficient additive": loop_efficient_additive,
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_the_papers_formula_token_by_token(name, layout):
    mixer = made(name)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    got = mixer(x.to(memory_format=layout))
    assert got.shape == x.shape
    for image, out in zip(x, got, strict=True):
        expected = torch.stack(LOOPS[name](mixer, image), 1).view_as(image)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_tokens_have_no_order(name):
    """Permuted pixels give permuted outputs: nothing but the global sums ties them together."""
    mixer = made(name)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    order = torch.randperm(12)
    permuted = mixer(x.flatten(2)[..., order].view_as(x))
    torch.testing.assert_close(permuted.flatten(2), mixer(x).flatten(2)[..., order])


@torch.no_grad()
def test_catm_knows_where_a_pixel_is():
    """Its depthwise convolutions see neighbours: what the other three of the figure do not."""
    mixer = AdditiveTokenMixer(8).double().eval()
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    order = torch.arange(11, -1, -1).roll(5)
    permuted = mixer(x.flatten(2)[..., order].view_as(x))
    assert not torch.allclose(permuted.flatten(2), mixer(x).flatten(2)[..., order], rtol=0.1)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_every_pixel_sees_every_other(name):
    mixer = made(name)
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    moved = x.clone()
    moved[..., 0, 0] += 1
    assert (mixer(moved) - mixer(x)).abs().amax((0, 1)).min() > 0


def linear(n, dim, outs):
    return n * dim * outs


@pytest.mark.parametrize("size", [6, 12])
def test_multiply_adds_by_hand(size):
    n, dim = size * size, 8
    shape = (2, dim, size, size)
    attention = 2 * (linear(n, dim, 4 * dim) + 2 * n * n * dim)
    assert macs(SelfAttention(dim), shape) == attention
    assert macs(SelfAttention(dim, fused=True), shape) == attention
    separable = linear(n, dim, 1 + 2 * dim) + linear(n, dim, dim) + n * dim
    assert macs(SeparableSelfAttention(dim), shape) == 2 * separable
    additive = linear(n, dim, 4 * dim) + 2 * n * dim
    assert macs(EfficientAdditiveAttention(dim), shape) == 2 * additive


def test_multiply_adds_of_catm_are_those_of_the_library():
    shape = (2, 8, 6, 5)
    assert macs(AdditiveTokenMixer(8), shape) == benchmark.macs(AdditiveTokenMixer(8), shape)


def test_counting_leaves_the_mixer_alone():
    mixer = SelfAttention(8, fused=True)
    macs(mixer, (1, 8, 4, 4))
    assert mixer.fused
    assert mixer.qkv.weight.device.type == "cpu"


def test_parameters_by_hand():
    dim = 8
    assert parameters(SelfAttention(dim)) == 4 * dim * dim + 4 * dim
    assert parameters(SeparableSelfAttention(dim)) == 3 * dim * dim + 3 * dim + dim + 1
    assert parameters(EfficientAdditiveAttention(dim)) == 4 * dim * dim + 5 * dim


@pytest.mark.parametrize("dim", [0, -1, 2.0, True])
@pytest.mark.parametrize(
    "mixer", [SelfAttention, SeparableSelfAttention, EfficientAdditiveAttention]
)
def test_a_width_that_is_none(mixer, dim):
    with pytest.raises(ValueError, match=f"dim: expected an integer >= 1, got {dim}"):
        mixer(dim)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="heads: expected a divisor of dim=10, got 4"):
        SelfAttention(10)
