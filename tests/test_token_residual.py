"""`reconstruct_tokens(residual=True)`: the tokens of before, and the change of the centres near them."""

import pytest
import torch

from casvit_kernels.tokens import TokenReconstruction, cluster_tokens, reconstruct_tokens

SIZE, GRID = (8, 10), (4, 5)
SUM = {"norm": "sum", "residual": True}


@pytest.fixture
def clusters():
    torch.manual_seed(0)
    return cluster_tokens(torch.randn(2, 80, 6), SIZE, GRID)


@pytest.mark.parametrize("window", [None, 3])
def test_centres_that_did_not_change_give_the_tokens_back_exactly(clusters, window):
    for norm in "l2", "sum":
        out = reconstruct_tokens(
            clusters.centres, clusters, norm=norm, window=window, residual=True
        )
        assert torch.equal(out, clusters.tokens)


def test_a_change_common_to_all_centres_reaches_every_token(clusters):
    change = torch.randn(6)
    out = reconstruct_tokens(clusters.centres + change, clusters, **SUM)
    torch.testing.assert_close(out, clusters.tokens + change)


@pytest.mark.parametrize("window", [None, 5])
def test_it_is_the_reconstruction_of_the_change(clusters, window):
    y = torch.randn_like(clusters.centres)
    change = reconstruct_tokens(y - clusters.centres, clusters, norm="sum", window=window)
    out = reconstruct_tokens(y, clusters, window=window, **SUM)
    torch.testing.assert_close(out, clusters.tokens + change)
    module = TokenReconstruction(window=window, **SUM)
    assert torch.equal(module(y, clusters), out)
    assert "residual=True" in repr(module)


def test_gradients_reach_y_and_the_tokens():
    torch.manual_seed(0)
    x = torch.randn(1, 80, 6, requires_grad=True)
    clusters = cluster_tokens(x, SIZE, GRID)
    y = torch.randn(1, 20, 6, requires_grad=True)
    seed = torch.randn(1, 80, 6)
    out = reconstruct_tokens(y, clusters, **SUM)
    at_y, at_x = torch.autograd.grad(out, (y, x), seed, retain_graph=True)
    plain = reconstruct_tokens(y, clusters, norm="sum")
    (expected,) = torch.autograd.grad(plain, y, seed)
    torch.testing.assert_close(at_y, expected)
    # Tokens are passed on, less what their centres are compared with.
    (of_centres,) = torch.autograd.grad(clusters.centres, x, expected)
    torch.testing.assert_close(at_x, seed - of_centres)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_wide_and_the_dtype_is_that_of_y(dtype):
    torch.manual_seed(0)
    x = torch.randn(1, 80, 6, dtype=dtype)
    clusters = cluster_tokens(x, SIZE, GRID)
    y = clusters.centres + 0.1 * torch.randn(1, 20, 6, dtype=dtype)
    out = reconstruct_tokens(y, clusters, **SUM)
    change = reconstruct_tokens(y.double() - clusters.centres.double(), clusters, norm="sum")
    assert out.dtype == dtype
    torch.testing.assert_close(out, (x.double() + change).to(dtype))


@pytest.mark.parametrize("window", [None, 3])
def test_y_may_be_of_another_dtype_than_the_tokens(clusters, window):
    y = torch.randn(2, 20, 6, dtype=torch.float64)
    out = reconstruct_tokens(y, clusters, window=window)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), reconstruct_tokens(y.float(), clusters, window=window))


def test_wrong_arguments(clusters):
    with pytest.raises(ValueError, match=r"y: expected the centres' shape \(2, 20, 6\) for resid"):
        reconstruct_tokens(torch.zeros(2, 20, 5), clusters, **SUM)
    with pytest.raises(TypeError, match="residual: expected True or False, got 1"):
        reconstruct_tokens(clusters.centres, clusters, residual=1)
