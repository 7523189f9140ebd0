"""`Clusters.mean`: what the centres are of the tokens, of anything else that tokens have."""

import pytest
import torch

from casvit_kernels.tokens import cluster_tokens

SIZE, GRID = (9, 10), (4, 5)  # cells of unequal size


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 90, 6)


def places():
    lines = (torch.arange(float(n)) for n in SIZE)
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), 2).view(1, 90, 2).expand(2, -1, -1)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_of_the_tokens_it_is_the_centres(x, iterations):
    clusters = cluster_tokens(x, SIZE, GRID, iterations=iterations, window=3)
    torch.testing.assert_close(clusters.mean(x), clusters.centres)
    torch.testing.assert_close(clusters.mean(torch.ones(2, 90, 1)), torch.ones(2, 20, 1))


def test_of_places_it_is_where_the_tokens_are():
    """Two vertical halves whose border is not that of the cells."""
    x = torch.zeros(2, *SIZE, 1)
    x[:, :, 3:] = 100
    clusters = cluster_tokens(x.flatten(1, 2), SIZE, (1, 2), temperature=1.0)
    torch.testing.assert_close(clusters.centres[0, :, 0], torch.tensor([0.0, 100.0]))
    torch.testing.assert_close(clusters.mean(places())[1], torch.tensor([[4.0, 1.0], [4.0, 6.0]]))


def test_a_centre_without_tokens_is_in_the_middle_of_its_cell():
    # The middle cell's tokens are those of its neighbours; its own centre, 0, is near none.
    x = torch.tensor([100.0, 100, -100, 100, -100, -100]).view(1, 6, 1)
    clusters = cluster_tokens(x, (1, 6), (1, 3), temperature=1.0)
    where = clusters.mean(torch.arange(6.0).view(1, 6, 1))
    torch.testing.assert_close(where.flatten(), torch.tensor([4 / 3, 2.5, 11 / 3]))


def test_dtypes_and_gradients(x):
    clusters = cluster_tokens(x, SIZE, GRID)
    values = torch.randn(2, 90, 3, dtype=torch.bfloat16)
    out = clusters.mean(values)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, clusters.mean(values.float()))
    one = torch.zeros(2, 90, 1, requires_grad=True)
    clusters.mean(one).sum().backward()
    # Every centre's weights add up to 1.
    torch.testing.assert_close(one.grad.sum(), torch.tensor(40.0))


def test_wrong_values(x):
    clusters = cluster_tokens(x, SIZE, GRID)
    with pytest.raises(
        TypeError, match=r"values: expected a floating torch.Tensor, got torch.int64"
    ):
        clusters.mean(torch.zeros(2, 90, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"values: expected shape \(2, 90, D\), got \(1, 90, 2\)"):
        clusters.mean(torch.zeros(1, 90, 2))
