"""Token clustering: arguments, modules, backends, and PyTorch's machinery around the operators."""

import copy
import pickle
import re

import pytest
import torch
from published_tokens import published_cluster, strided, tokens

from casvit_kernels import BackendUnavailable, use_backend
from casvit_kernels.tokens import (
    TokenClustering,
    TokenReconstruction,
    cluster_tokens,
    reconstruct_tokens,
)


def test_modules_are_the_functions(road):
    x, y = tokens((7, 6), 8), torch.randn(2, 12, 5)
    clustering = TokenClustering((4, 3), iterations=2, window=3, temperature=0.1)
    clusters = clustering(x, (7, 6))
    expected = cluster_tokens(x, (7, 6), (4, 3), iterations=2, window=3, temperature=0.1)
    assert torch.equal(clusters.centres, expected.centres)
    reconstruction = TokenReconstruction(neighbours=3, temperature=0.2, norm="sum", window=3)
    assert torch.equal(
        reconstruction(y, clusters),
        reconstruct_tokens(y, clusters, neighbours=3, temperature=0.2, norm="sum", window=3),
    )
    assert "grid=(4, 3)" in repr(clustering)
    assert "norm='sum'" in repr(reconstruction)


# Bad input

X = torch.zeros(1, 6, 4)
GOOD = {"x": X, "size": (2, 3), "grid": (1, 2)}
BAD_CLUSTERING = [
    (
        {"x": X.int()},
        TypeError,
        "x: expected float32, bfloat16, float16 or float64, got torch.int32",
    ),
    ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    ({"x": X[0]}, ValueError, "x: expected 3 dimensions (B, N, C), got shape (6, 4)"),
    (
        {"x": torch.zeros(1, 7, 4)},
        ValueError,
        "x: expected 2 x 3 = 6 tokens in dimension 1, without",
    ),
    ({"grid": (3, 2)}, ValueError, "grid: expected at most the map's 2 x 3, got 3 x 2"),
    ({"grid": (0, 2)}, ValueError, "grid: expected at least 1, got 0"),
    ({"grid": (1, 2, 3)}, TypeError, "grid: expected a pair of whole numbers, got (1, 2, 3)"),
    ({"grid": 2}, TypeError, "grid: expected a pair of whole numbers, got 2"),
    ({"size": (2.0, 3)}, TypeError, "size: expected a whole number, got 2.0"),
    ({"window": 4}, ValueError, "window: expected an odd number of cells across, got 4"),
    ({"window": -1}, ValueError, "window: expected at least 1, got -1"),
    ({"iterations": -1}, ValueError, "iterations: expected at least 0, got -1"),
    ({"iterations": True}, TypeError, "iterations: expected a whole number, got True"),
    ({"temperature": 0}, ValueError, "temperature: expected a finite number above 0, got 0"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number above 0"),
    ({"temperature": 1e39}, ValueError, "temperature: expected a finite number in float32, got 1e"),
    ({"temperature": "warm"}, TypeError, "temperature: expected a number, got 'warm'"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD_CLUSTERING, ids=lambda v: str(v)[:20])
def test_bad_input_of_clustering(wrong, kind, message):
    given = {**GOOD, **wrong}
    with pytest.raises(kind, match=re.escape(message)):
        cluster_tokens(given.pop("x"), given.pop("size"), given.pop("grid"), **given)


BAD_RECONSTRUCTION = [
    ({"y": torch.zeros(1, 2, 4).int()}, TypeError, "y: expected a floating torch.Tensor, got"),
    ({"y": None}, TypeError, "y: expected a floating torch.Tensor, got NoneType"),
    ({"y": torch.zeros(1, 3, 4)}, ValueError, "y: expected shape (1, 2, C), as the centres, got"),
    ({"y": torch.zeros(2, 2, 4)}, ValueError, "y: expected shape (1, 2, C), as the centres, got"),
    (
        {"y": torch.zeros(1, 2, 4, device="meta")},
        ValueError,
        "y: expected the centres' device, cpu",
    ),
    ({"clusters": X}, TypeError, "clusters: expected Clusters, got Tensor"),
    ({"neighbours": 0}, ValueError, "neighbours: expected at least 1, got 0"),
    ({"neighbours": 1.5}, TypeError, "neighbours: expected a whole number, got 1.5"),
    ({"temperature": -1.0}, ValueError, "temperature: expected a finite number above 0, got -1.0"),
    ({"norm": "l1"}, ValueError, "norm: expected 'l2' or 'sum', got 'l1'"),
    ({"window": 2}, ValueError, "window: expected an odd number of cells across, got 2"),
]


@pytest.mark.parametrize(
    ("wrong", "kind", "message"), BAD_RECONSTRUCTION, ids=lambda v: str(v)[:20]
)
def test_bad_input_of_reconstruction(wrong, kind, message):
    given = {"y": torch.zeros(1, 2, 4), "clusters": cluster_tokens(**GOOD), **wrong}
    with pytest.raises(kind, match=re.escape(message)):
        reconstruct_tokens(given.pop("y"), given.pop("clusters"), **given)


# Backends and PyTorch's machinery


def test_a_backend_that_cannot_serve_is_refused():
    x = tokens((7, 6), 8)
    clusters = cluster_tokens(x, (7, 6), (4, 3))
    with use_backend("cuda"):
        for call in (
            lambda: cluster_tokens(x, (7, 6), (4, 3)),
            lambda: reconstruct_tokens(torch.randn(2, 12, 5), clusters),
        ):
            with pytest.raises(BackendUnavailable, match=r"'cuda' has no kernels.*cpu"):
                call()


def test_float64_is_not_the_kernels(require_native):
    x = tokens((7, 6), 8).double()
    with use_backend("cpu"), pytest.raises(BackendUnavailable, match=r"not torch\.float64"):
        cluster_tokens(x, (7, 6), (4, 3))
    found = cluster_tokens(x, (7, 6), (4, 3)).centres  # the automatic choice moves on
    torch.testing.assert_close(found, published_cluster(x, (7, 6), (4, 3))[0])


def test_the_kernels_are_the_choice_on_the_cpu(require_native, monkeypatch):
    from casvit_kernels.ops.tokens import local, reference

    def no(*_):
        raise AssertionError("the formulas were called")

    monkeypatch.setattr(local, "cluster", no)
    monkeypatch.setattr(reference, "reconstruct", no)
    clusters = cluster_tokens(tokens((7, 6), 8), (7, 6), (4, 3))
    reconstruct_tokens(torch.randn(2, 12, 5), clusters)


def test_opcheck(require_native):
    x = strided(tokens((7, 6), 9), "map").requires_grad_()
    ops = torch.ops.casvit_kernels
    torch.library.opcheck(ops.cluster_tokens, (x, [7, 6], [4, 3], 2, 3, 0.02, "cpu"))
    torch.library.opcheck(
        ops.cluster_tokens, (x.detach().bfloat16(), [7, 6], [4, 3], 2, 3, 0.02, "cpu")
    )
    y, d = torch.randn(2, 12, 5, requires_grad=True), torch.rand(2, 42, 12)
    torch.library.opcheck(ops.reconstruct_tokens, (y, d, 4, 0.02, "l2", "cpu"))
    torch.library.opcheck(ops.token_weights, (d, 4, 0.02, "l2", "cpu"))


def test_the_operator_checks_what_it_is_given(require_native):
    op = torch.ops.casvit_kernels.cpu_cluster_tokens
    x = torch.zeros(1, 6, 4)
    for given, message in (
        ((x.double(), [2, 3], [1, 2], 1, 3, 0.02), "x: expected float32, bfloat16 or float16"),
        ((x, [2, 4], [1, 2], 1, 3, 0.02), "x: expected 8 tokens"),
        ((x, [2, 3], [3, 2], 1, 3, 0.02), "grid: expected 1 to 2, got 3"),
        ((x, [2, 3], [1, 2], 0, 3, 0.02), "iterations: expected at least 1"),
        ((x, [2, 3], [1, 2], 1, 2, 0.02), "window: expected an odd number up to 13, got 2"),
        ((x, [2, 3], [1, 2], 1, 2**63 - 1, 0.02), "window: expected an odd number up to 13"),
        ((x, [2**32, 3], [1, 2], 1, 3, 0.02), "size: expected less than 2^31, got 4294967296"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(*given)
    op = torch.ops.casvit_kernels.cpu_reconstruct_tokens
    with pytest.raises(RuntimeError, match="distances: expected those of 1 images to 6 centres"):
        op(x, torch.zeros(1, 9, 5), 2, 0.02, True)


def both(x, y):
    clusters = cluster_tokens(x, (7, 6), (4, 3))
    return clusters.centres, reconstruct_tokens(y, clusters, neighbours=4), clusters.labels()


@pytest.mark.parametrize("window", [11, 2**31 + 1, 2**63 - 1, 2**70 + 1])
def test_a_window_beyond_the_grid_changes_no_bit(window, road):
    x = tokens((7, 6), 8)
    enough = cluster_tokens(x, (7, 6), (4, 3), window=7)
    clusters = cluster_tokens(x, (7, 6), (4, 3), window=window)
    assert torch.equal(clusters.centres, enough.centres)
    assert torch.equal(clusters.positions(), enough.positions())
    y = torch.randn(2, 12, 5)
    expected = reconstruct_tokens(y, clusters, window=7)
    assert torch.equal(reconstruct_tokens(y, clusters, window=window), expected)


def test_more_neighbours_than_centres_are_all(road):
    clusters, y = cluster_tokens(tokens((7, 6), 8), (7, 6), (4, 3)), torch.randn(2, 12, 5)
    expected = reconstruct_tokens(y, clusters, neighbours=12)
    assert torch.equal(reconstruct_tokens(y, clusters, neighbours=2**70), expected)


def test_centres_written_to_are_noticed(road):
    clusters = cluster_tokens(tokens((7, 6), 8), (7, 6), (4, 3))
    y = clusters.centres
    y += 1  # as a residual block may
    for call in (lambda: reconstruct_tokens(y, clusters), clusters.labels):
        with pytest.raises(RuntimeError, match=r"their centres as they were made.* written to"):
            call()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("writes", [0, 3])  # to the tokens, before they are clustered
def test_copies_of_clusters(writes, copied):
    x, y = tokens((7, 6), 8), torch.randn(2, 12, 5)
    for _ in range(writes):
        x += 1
    clusters = cluster_tokens(x, (7, 6), (4, 3))
    other = copied(clusters)
    assert torch.equal(reconstruct_tokens(y, other), reconstruct_tokens(y, clusters))
    other.tokens.add_(1)
    with pytest.raises(RuntimeError, match=r"tokens .* written to"):
        reconstruct_tokens(y, other)
    x += 1
    with pytest.raises(RuntimeError, match=r"tokens .* written to"):  # and a copy would not know
        copied(clusters)


def test_clusters_of_outside_in_a_compiled_function(road):
    clusters, y = cluster_tokens(tokens((7, 6), 8), (7, 6), (4, 3)), torch.randn(2, 12, 5)
    compiled = torch.compile(
        lambda y: reconstruct_tokens(y, clusters), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(y), reconstruct_tokens(y, clusters))


def test_shapes_on_the_meta_device():
    x = torch.empty(2, 42, 8, device="meta", dtype=torch.bfloat16)
    clusters = cluster_tokens(x, (7, 6), (4, 3))
    rebuilt = reconstruct_tokens(torch.empty(2, 12, 5, device="meta"), clusters)
    assert (clusters.centres.shape, clusters.centres.dtype) == ((2, 12, 8), torch.bfloat16)
    assert (rebuilt.shape, rebuilt.device.type) == ((2, 42, 5), "meta")


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]
)
def test_compiled_whole(compiler, road):
    torch._dynamo.reset()
    # Tokens that differ so much that no two weights are within rounding of each other.
    x = tokens((7, 6), 8, scale=4.0).requires_grad_()
    y = torch.randn(2, 12, 5, requires_grad=True)
    found, expected = torch.compile(both, fullgraph=True, backend=compiler)(x, y), both(x, y)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    grads = [torch.autograd.grad(a.sum() + (b * b).sum(), (x, y)) for a, b, _ in (found, expected)]
    for f, e in zip(*grads, strict=True):
        torch.testing.assert_close(f, e)


def test_exported_without_operators_of_ours(require_native):
    class Net(torch.nn.Module):
        def forward(self, x, y):
            return both(x, y)

    x, y = tokens((7, 6), 8, scale=4.0), torch.randn(2, 12, 5)
    program = torch.export.export(Net(), (x, y))
    assert "casvit_kernels" not in str(program.graph)
    for f, e in zip(program.module()(x, y), both(x, y), strict=True):
        torch.testing.assert_close(f, e)
