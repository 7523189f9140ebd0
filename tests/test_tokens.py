"""Token clustering and reconstruction, held to the published formulas in float64 written here again."""

import functools

import pytest
import torch
from conftest import using_instruction_set
from published_tokens import (
    assert_as_exact,
    published_cluster,
    published_reconstruct,
    strided,
    tokens,
)

from casvit_kernels import use_backend
from casvit_kernels.testing import poisoned
from casvit_kernels.tokens import (
    Clusters,
    cluster_tokens,
    reconstruct_tokens,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_cluster(x, size, grid, **settings):
    found = cluster_tokens(x, size, grid, **settings).centres
    truth, _ = published_cluster(x.double(), size, grid, **settings)
    own, _ = published_cluster(x.float(), size, grid, **settings)
    assert found.dtype == x.dtype
    assert found.shape == (x.shape[0], grid[0] * grid[1], x.shape[2])
    assert found.is_contiguous()
    if x.shape[0]:
        assert_as_exact(found, own, truth, x.dtype)


CASES = {
    "published": ((10, 10), (7, 7), {}),
    "odd": ((7, 11), (3, 4), {}),
    "window 1": ((9, 8), (4, 5), {"window": 1}),
    "window 3": ((9, 8), (4, 5), {"window": 3}),
    "window 7": ((16, 12), (8, 9), {"window": 7}),
    "window over the grid": ((6, 5), (3, 2), {"window": 9}),
    "no iteration": ((7, 11), (3, 4), {"iterations": 0}),
    "one iteration": ((7, 11), (3, 4), {"iterations": 1}),
    "as many": ((5, 6), (5, 6), {}),
    "one": ((7, 9), (1, 1), {}),
    "a line": ((1, 40), (1, 7), {"temperature": 0.5}),
    "a column": ((40, 1), (13, 1), {"temperature": 0.1}),
    "one token": ((1, 1), (1, 1), {}),
    "hundreds of tokens in a cell": ((40, 30), (2, 2), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "_"))
def test_centres_are_those_of_the_published_formulas(case, dtype, road):
    size, grid, settings = CASES[case]
    check_cluster(tokens(size, 45, dtype=dtype), size, grid, **settings)


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 130, 256, 1024])
def test_any_number_of_channels(channels, road):
    check_cluster(tokens((9, 8), channels), (9, 8), (4, 5), temperature=0.02)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch(batch, road):
    x = tokens((7, 6), 20, batch)
    check_cluster(x, (7, 6), (4, 3))
    clusters = cluster_tokens(x, (7, 6), (4, 3))
    assert clusters.labels().shape == (batch, 42)
    assert reconstruct_tokens(torch.randn(batch, 12, 8), clusters).shape == (batch, 42, 8)


@pytest.mark.parametrize("how", ["map", "behind a class token", "every second channel", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(how, dtype, road):
    x = strided(tokens((7, 6), 21, dtype=dtype), how)
    assert how == "behind a class token" or not x.is_contiguous()
    with poisoned():
        found = cluster_tokens(x, (7, 6), (4, 3))
        expected = cluster_tokens(x.contiguous(), (7, 6), (4, 3))
        assert torch.equal(found.centres, expected.centres)
        y = strided(torch.randn(x.shape[0], 12, 9, dtype=dtype), "map")
        torch.testing.assert_close(
            reconstruct_tokens(y, found), reconstruct_tokens(y.contiguous(), expected)
        )


@pytest.mark.parametrize(("size", "grid"), [((12, 10), (7, 6)), ((30, 20), (3, 2))])
def test_batch_mates_change_no_bit(size, grid, road):
    x, y = tokens(size, 67, 3), torch.randn(3, grid[0] * grid[1], 30)
    others = torch.stack((x[1] * 1000, x[1], torch.full_like(x[2], torch.nan)))
    found = [cluster_tokens(images, size, grid) for images in (x, others)]
    assert torch.equal(found[0].centres[1], found[1].centres[1])
    rebuilt = [reconstruct_tokens(y, clusters) for clusters in found]
    assert torch.equal(rebuilt[0][1], rebuilt[1][1])
    if road == "cpu":  # PyTorch's batched GEMM may add up in another order than that of one
        alone = cluster_tokens(x[1:2], size, grid)
        assert torch.equal(alone.centres[0], found[0].centres[1])


def test_threads_change_no_bit(require_native):
    size, grid = (20, 17), (9, 8)
    x, y = tokens(size, 200), torch.randn(2, 72, 50)
    found = []
    with use_backend("cpu"):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for images in (x, x[:1]):
                clusters = cluster_tokens(images, size, grid)
                found.append((clusters.centres[0], threads))
            d = torch.cdist(x[0], found[0][0])[None] ** 2
            op = torch.ops.casvit_kernels.cpu_reconstruct_tokens
            found.append((op(y[:1], d, 5, 0.02, True), threads))
    for kind in (0, 1, 2):
        first = found[kind][0]
        assert all(torch.equal(f, first) for f, _ in found[kind::3])


# Reconstruction


def check_reconstruction(channels, neighbours, norm, dtype):
    size, grid = (9, 10), (5, 6)
    x = tokens(size, 33)
    clusters = cluster_tokens(x, size, grid)
    y = torch.randn(2, 30, channels).to(dtype)
    found = reconstruct_tokens(y, clusters, neighbours=neighbours, temperature=0.1, norm=norm)
    given = (neighbours, 0.1, norm)
    truth = published_reconstruct(y.double(), x.double(), clusters.centres.double(), *given)
    own = published_reconstruct(y.float(), x, clusters.centres, *given)
    assert found.dtype == dtype
    # Of float64 y too the weights are float32, as the tokens are.
    assert_as_exact(found, own, truth, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["l2", "sum"])
@pytest.mark.parametrize("neighbours", [1, 4, 20, 1000])
def test_reconstruction_is_that_of_the_published_formulas(neighbours, norm, dtype, road):
    if dtype == torch.float64 and road == "cpu":
        pytest.skip("float64 is not the kernels'")
    check_reconstruction(27, neighbours, norm, dtype)


def test_a_window_over_the_grid_rebuilds_as_all_centres(road):
    size, grid = (9, 10), (5, 6)
    clusters = cluster_tokens(tokens(size, 33), size, grid)
    y = torch.randn(2, 30, 27)
    for norm in ("l2", "sum"):
        everywhere = reconstruct_tokens(y, clusters, norm=norm)
        torch.testing.assert_close(
            reconstruct_tokens(y, clusters, norm=norm, window=11), everywhere
        )


def test_a_window_leaves_out_the_centres_beyond(road):
    size = grid = (1, 9)
    clusters = cluster_tokens(torch.zeros(1, 9, 4), size, grid)
    y = torch.eye(9)[None]
    found = reconstruct_tokens(y, clusters, norm="sum", window=3)[0]
    expected = torch.tensor([[abs(i - j) <= 1 for j in range(9)] for i in range(9)]).float()
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))


def test_norm_sum_keeps_a_constant_map_and_l2_enlarges_it(road):
    clusters = cluster_tokens(tokens((9, 10), 16, scale=0.1), (9, 10), (5, 6))
    y = torch.full((2, 30, 3), 2.0)
    torch.testing.assert_close(
        reconstruct_tokens(y, clusters, norm="sum"), torch.full((2, 90, 3), 2.0)
    )
    assert (reconstruct_tokens(y, clusters, norm="l2") > 2.5).all()


def test_equally_near_centres_all_count(road):
    """Four centres at one distance, and three neighbours: the published comparison keeps all four."""
    x = torch.zeros(1, 4, 2)
    around = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])[None]
    clusters = Clusters(around, x, (2, 2), (2, 2), 5, 0.5)
    found = reconstruct_tokens(torch.eye(4)[None], clusters, neighbours=3, norm="sum")
    torch.testing.assert_close(found, torch.full((1, 4, 4), 0.25))


def test_labels_are_the_nearest_of_all_centres(road):
    size, grid = (12, 11), (4, 3)
    x = tokens(size, 8, scale=5.0)
    clusters = cluster_tokens(x, size, grid)
    labels = clusters.labels()
    assert labels.dtype == torch.int64
    expected = torch.cdist(x.double(), clusters.centres.double()).argmin(2)
    assert torch.equal(labels, expected)


def test_labels_of_many_centres_are_whole_numbers():
    """Not of the tokens' dtype: bfloat16 counts to 256."""
    x = torch.randn(1, 400, 16, dtype=torch.bfloat16)
    clusters = cluster_tokens(x, (20, 20), (20, 20), iterations=0)
    assert torch.equal(clusters.labels(), torch.arange(400)[None])


# Gradients


def gradients(call, x):
    x = x.detach().requires_grad_()
    out = call(x)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return x.grad


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_centres(dtype, iterations, road):
    """Those of the formulas with the last affinities as constants."""
    size, grid = (9, 8), (4, 5)
    x = tokens(size, 19, dtype=dtype)
    found = gradients(lambda x: cluster_tokens(x, size, grid, iterations=iterations).centres, x)
    truth, own = (
        gradients(
            lambda x: published_cluster(x, size, grid, iterations=iterations, detached=True)[0],
            x.to(kind),
        )
        for kind in (torch.float64, torch.float32)
    )
    assert found.dtype == dtype
    if dtype == torch.bfloat16:  # the gradient at the centres is rounded too
        torch.testing.assert_close(found.double(), truth, rtol=0.02, atol=0.02)
    else:
        assert_as_exact(found, own, truth, dtype)


def test_gradcheck_of_both_in_float64():
    size, grid = (5, 6), (3, 4)
    x = tokens(size, 3).double().requires_grad_()
    # Affinities count as constants: numerically only without any iteration.
    assert torch.autograd.gradcheck(
        lambda x: cluster_tokens(x, size, grid, iterations=0).centres, x
    )
    clusters = cluster_tokens(x.detach(), size, grid)
    y = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    for window in (None, 3):
        assert torch.autograd.gradcheck(
            lambda y, window=window: reconstruct_tokens(y, clusters, neighbours=4, window=window), y
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_of_reconstruction(window, dtype, road):
    """The map is linear in y: its gradient is the transpose, entry by entry."""
    size, grid = (7, 6), (4, 3)
    clusters = cluster_tokens(tokens(size, 19), size, grid)
    call = functools.partial(reconstruct_tokens, clusters=clusters, neighbours=5, window=window)
    matrix = call(torch.eye(12).expand(2, -1, -1))  # (B, N, K)
    found = gradients(call, torch.randn(2, 12, 8).to(dtype))
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(2, 42, 8, generator=generator).to(dtype)
    expected = (matrix.double().transpose(1, 2) @ grad.double()).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


# Hard cases


def test_huge_tokens_that_differ_little(road):
    """Around 1e4: |x|^2 - 2 x c + |c|^2 would lose all that the affinities depend on."""
    x = tokens((9, 8), 32) + 1e4
    check_cluster(x, (9, 8), (4, 5))


def test_huge_tokens_that_differ_much(road):
    check_cluster(tokens((9, 8), 32, scale=1e4), (9, 8), (4, 5))


def test_equal_tokens_stay_equal(road):
    x = torch.randn(1, 1, 24).expand(2, 72, 24)
    clusters = cluster_tokens(x, (9, 8), (4, 5))
    torch.testing.assert_close(clusters.centres, x[:, :20], rtol=1e-6, atol=0)
    y = torch.randn(2, 1, 6).expand(2, 20, 6)
    torch.testing.assert_close(
        reconstruct_tokens(y, clusters, norm="sum"), y[:, :1].expand(2, 72, 6)
    )


def test_weights_that_would_all_underflow(road):
    """Published: exp(-temperature d) of every centre is 0 in float32, and so is the rebuilt token."""
    size = grid = (3, 4)
    x = tokens(size, 64, scale=200.0)
    clusters = cluster_tokens(x, size, grid, iterations=0)
    moved = x + 40  # further than 1e5 from its own centre, by the square
    far = Clusters(clusters.centres, moved, size, grid, 5, 0.02)
    assert (torch.exp(-0.02 * torch.cdist(moved, clusters.centres) ** 2) == 0).all()
    y = torch.randn(2, 12, 5)
    nearest = torch.cdist(moved.double(), clusters.centres.double()).argmin(2)
    expected = y.gather(1, nearest[..., None].expand(-1, -1, 5))
    torch.testing.assert_close(reconstruct_tokens(y, far), expected)
    torch.testing.assert_close(reconstruct_tokens(y, far, window=9), expected)


def test_a_centre_without_affinity_stays(road):
    """The middle one is the mean of two far tokens, which are those of its neighbours'."""
    x = torch.tensor([1.0, 1, 1, -1, -1, -1]).mul(1e3)[None, :, None]
    found = cluster_tokens(x, (1, 6), (1, 3), window=3).centres
    assert found.flatten().tolist() == [1e3, 0, -1e3]


def test_nan_stays_in_its_windows(road):
    size, grid, window = (20, 20), (12, 12), 3
    x = tokens(size, 16)
    # In cell (3, 3), beside cell (2, 2) of one token, whose table is filled up with the next ones.
    x[0, 5 * 20 + 5, 3] = torch.nan
    for across in (1, window):
        clusters = cluster_tokens(x, size, grid, window=across)
        wrong = clusters.centres[0].isnan().any(1).view(grid)
        assert wrong[3, 3]
        assert wrong.sum() == 1
    alone = cluster_tokens(x[1:], size, grid, window=window).centres
    torch.testing.assert_close(clusters.centres[1:], alone)
    # Where no window reaches nothing is held up: centres moved from the average.
    first = cluster_tokens(x, size, grid, window=window, iterations=0).centres
    stayed = torch.isclose(clusters.centres[0], first[0]).all(1).view(grid)
    assert stayed[1:6, 1:6].sum() == 24  # all but the one that is NaN
    assert stayed.sum() == 24
    rebuilt = reconstruct_tokens(torch.randn(2, 144, 4), clusters, window=window)
    lost = rebuilt[0].isnan().any(1).view(size)
    assert lost[5, 5]
    assert not lost[10:].any()
    assert not lost[:, 10:].any()
    assert clusters.labels()[0].unique().numel() > 50  # the others have theirs
    assert clusters.labels()[0, 5 * 20 + 5] == 0


def test_tokens_written_to_are_noticed(road):
    x = tokens((7, 6), 8)
    clusters = cluster_tokens(x, (7, 6), (4, 3))
    y = torch.randn(2, 12, 5)
    reconstruct_tokens(y, clusters)
    x += 1
    for call in (lambda: reconstruct_tokens(y, clusters), clusters.labels):
        with pytest.raises(RuntimeError, match="written to in place"):
            call()


def test_in_inference_mode(road):
    with torch.inference_mode():
        x = tokens((7, 6), 8)
        clusters = cluster_tokens(x, (7, 6), (4, 3))
        assert reconstruct_tokens(torch.randn(2, 12, 5), clusters).shape == (2, 42, 5)


def test_autocast_changes_no_bit(road):
    """Distances in bfloat16 would choose other neighbours."""
    x, y = tokens((9, 8), 40), torch.randn(2, 20, 9)

    def both():
        clusters = cluster_tokens(x, (9, 8), (4, 5))
        rebuilt = [reconstruct_tokens(y, clusters, window=window) for window in (None, 3)]
        return [clusters.centres, clusters.labels(), *rebuilt]

    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(f, e) for f, e in zip(both(), expected, strict=True))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request):
    """Each one that has kernels of its own and that this CPU has."""
    with using_instruction_set(request.param), use_backend("cpu"):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 45, 200, 1030])
def test_centres_on_every_instruction_set(channels, dtype, instruction_set):
    for size, grid, settings in list(CASES.values())[: 1 if channels > 200 else None]:
        with poisoned():
            check_cluster(tokens(size, channels, dtype=dtype), size, grid, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neighbours", [1, 7, 1000])
def test_reconstruction_on_every_instruction_set(neighbours, dtype, instruction_set):
    for channels in (1, 45, 200):
        check_reconstruction(channels, neighbours, "l2", dtype)


def test_weights_down_to_the_last_subnormal_number(instruction_set):
    """Of two centres, one at the token: exp(-d) and 1, over their sum."""
    d = torch.cat((torch.linspace(0, 110, 4001), torch.tensor([1e5, 1e30, torch.inf])))
    pairs = torch.stack((torch.zeros_like(d), d), 1)[None]
    found = torch.ops.casvit_kernels.cpu_token_weights(pairs, 2, 1.0, False)[0]
    expected = torch.exp(-pairs[0].double())
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=4e-7, atol=3e-45)


@pytest.mark.parametrize("place", [0, 3, 20, 36])
def test_a_distance_that_is_nan_makes_its_token_nan(place, instruction_set):
    d = torch.rand(1, 3, 37)
    d[0, 1, place] = torch.nan
    weights = torch.ops.casvit_kernels.cpu_token_weights(d, 5, 1.0, True)[0]
    rebuilt = torch.ops.casvit_kernels.cpu_reconstruct_tokens(torch.rand(1, 37, 9), d, 5, 1.0, True)
    for t in (weights, rebuilt[0]):
        assert t[1].isnan().all()
        assert t[[0, 2]].isfinite().all()
    assert ((weights[[0, 2]] > 0).sum(1) == 5).all()
