"""`cluster_tokens` and `reconstruct_tokens`: the layers as functions, checked. No arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.tokens import dispatch, local, reference
from ..ops.tokens.cells import reaching

Size = tuple[int, int]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LABELLED = 1 << 24  # distances at a time, of `Clusters.labels`


@dataclass(frozen=True, eq=False)
class Clusters:
    """What `cluster_tokens` makes of a map of tokens; see there.

    Attributes:
        centres: ``(B, K, C)``, K = h w, rows first; of the tokens' dtype.
        tokens: ``(B, N, C)``, those that were clustered: reconstruction compares them with the centres.
            Neither must be written to meanwhile.
        size: ``(H, W)`` of the tokens.
        grid: ``(h, w)`` of the centres.
        window: as given.
        temperature: as given.
    """

    centres: Tensor
    tokens: Tensor
    size: Size
    grid: Size
    window: int
    temperature: float
    _affinity: Tensor | None = field(
        repr=False, default=None
    )  # (B, N, window**2); None: means of cells
    _versions: tuple[int | None, int | None] = field(
        repr=False, default=(None, None)
    )  # write counters of tokens and centres; None: not known

    def labels(self) -> Tensor:
        """``(B, N)`` int64: for each token the nearest of all centres, not of its window's alone.

        Made when asked: B N K distances (arXiv 2210.01035, section 3.2). Of equal ones the first; a
        token that is not finite has label 0.
        """
        tokens, centres = self.checked_tokens(), reference.wide(self.centres)
        found = []
        step = max(1, _LABELLED // max(1, centres.shape[0] * centres.shape[1]))
        with torch.no_grad(), reference.full_precision(tokens.device.type):
            for first in range(0, tokens.shape[1], step):
                some = reference.wide(tokens[:, first : first + step])
                found.append(reference.distances(some, centres).nan_to_num(torch.inf).argmin(2))
        return torch.cat(found, 1)

    def positions(self) -> Tensor:
        """``(B, K, 2)``: mean row and column of each centre's tokens, weighted as the centre itself is.

        float32 (float64 for float64), without gradient. On a grid as fine as the map, not iterated,
        exactly the tokens' own.
        """
        with torch.no_grad():
            lines = [
                torch.arange(
                    n, dtype=reference.wide(self.tokens[:0]).dtype, device=self.tokens.device
                )
                for n in self.size
            ]
            places = torch.stack(torch.meshgrid(*lines, indexing="ij"), 2).view(1, -1, 2)
            return self.mean(places.expand(self.tokens.shape[0], -1, -1))

    def mean(self, values: Tensor) -> Tensor:
        """``(B, K, D)``: each centre's means of ``values``, ``(B, N, D)``, by its tokens' affinities.

        Of positions: where a centre is, for models with rotary or relative ones; it may be far from the
        middle of its cell. Sums are float32 (float64 of float64) and so is the result,
        differentiable. Of a centre without tokens the adaptive average.

        Raises:
            TypeError, ValueError: ``values`` is no floating tensor of that shape.
        """
        if not isinstance(values, Tensor) or not values.dtype.is_floating_point:
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values: expected a floating torch.Tensor, got {got}")
        b, n, _ = self.tokens.shape
        if values.dim() != 3 or values.shape[:2] != (b, n):
            raise ValueError(f"values: expected shape ({b}, {n}, D), got {tuple(values.shape)}")
        if self._affinity is None:
            return reference.pooled(values, self.size, self.grid)
        window = reaching(self.window, self.grid)
        return local.mean(values, self._affinity, self.size, self.grid, window)

    def checked_tokens(self) -> Tensor:
        """The tokens. Under torch.compile, where write counters are not known, unchecked.

        Raises:
            RuntimeError: they or the centres were written to since.
        """
        if torch.compiler.is_compiling():
            return self.tokens
        for name, before in zip(("tokens", "centres"), self._versions, strict=True):
            if before is not None and getattr(self, name)._version != before:
                raise RuntimeError(
                    f"clusters: expected their {name} as they were made, they were written to in place "
                    "since: write to a copy of them"
                )
        return self.tokens

    def __getstate__(self) -> dict[str, Any]:
        self.checked_tokens()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A tensor's copy counts its writes anew.
        vars(self).update(state, _versions=(_version(state["tokens"]), _version(state["centres"])))


def _version(x: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def cluster_tokens(
    x: Tensor,
    size: Size,
    grid: Size,
    *,
    iterations: int = 5,
    window: int = 5,
    temperature: float = 0.02,
) -> Clusters:
    """Clusters neighbouring tokens to a smaller grid (arXiv 2210.01035, section 3.2).

    The first centres are the map's adaptive average on the grid. Each iteration compares a token with
    the centres of the window around its own cell: affinities are the softmax of -temperature times the
    squared L2 distance, the new centres the means of the tokens weighted by them.

    Args:
        x: ``(B, N, C)``, N = H W tokens, rows first, without class or register tokens; float32,
            bfloat16, float16 or float64; any strides. Distances and sums are float32 (float64 of
            float64). A token that is NaN makes the first centres NaN that it is averaged into.
            Centres at most 2 (window // 2) cells away from one of those stay at their average.
        size: ``(H, W)`` of the map.
        grid: ``(h, w)`` of the centres, at most that.
        iterations: of the centres, at least 0.
        window: cells across, odd; cells outside of the grid do not count.
        temperature: of the distances; above 0, finite in float32.

    Returns:
        `Clusters`. No result depends on other maps of the batch. Differentiable by the last weighted
        mean: as in the published code affinities count as constants. A centre that no token has any
        affinity to stays where it is (in the published code it becomes 0).

    Raises:
        TypeError: ``x`` is no floating tensor, or a number is not of its kind.
        ValueError: a shape, the grid, the window or a number does not fit.
        BackendUnavailable: the backend that `use_backend` asks for cannot serve the call.
    """
    check(size, grid, iterations, window, temperature)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() != 3:
        raise ValueError(f"x: expected 3 dimensions (B, N, C), got shape {tuple(x.shape)}")
    if x.shape[1] != size[0] * size[1]:
        raise ValueError(
            f"x: expected {size[0]} x {size[1]} = {size[0] * size[1]} tokens in dimension 1, without "
            f"class or register tokens, got shape {tuple(x.shape)}"
        )
    size, grid = (size[0], size[1]), (grid[0], grid[1])
    with reference.full_precision(x.device.type):
        centres, affinity = dispatch.cluster(
            x, size, grid, iterations, reaching(window, grid), temperature
        )
    kept = affinity if iterations else None
    versions = _version(x), _version(centres)
    return Clusters(centres, x, size, grid, window, temperature, kept, versions)


def reconstruct_tokens(
    y: Tensor,
    clusters: Clusters,
    *,
    neighbours: int = 20,
    temperature: float | None = None,
    norm: str = "l2",
    window: int | None = None,
    residual: bool = False,
) -> Tensor:
    """Rebuilds a dense map from refined centres (arXiv 2210.01035, section 3.3).

    A token is a combination of the refined centres of those that were nearest to it when they were
    clustered, weighted by exp(-temperature times the squared L2 distance).

    Args:
        y: ``(B, K, C')``, the centres after more layers; any floating dtype.
        clusters: of `cluster_tokens`.
        neighbours: centres that count for a token, at least 1; of equally near ones all.
        temperature: above 0; None: that of the clustering.
        norm: what weights are divided by. ``"l2"``: their L2 norm, as in the published code, so that
            they add up to more than 1 and a map that is constant comes back larger. ``"sum"``: their
            sum, which keeps it as it is.
        window: centres within so many cells across, odd, around a token's own; None: all, as
            published, so that one that is NaN makes all tokens NaN. N window**2 instead of N K
            distances, nearly the same result.
        residual: True: the result is the tokens as they were clustered plus the rebuilt change of
            their centres, ``y - clusters.centres``, so that detail finer than the grid stays. For
            blocks that add to what they are given, and with ``norm="sum"``; C' is then C. Not
            published; docs/token_clustering.md has what it brings.

    Returns:
        ``(B, N, C')`` of the dtype of ``y``; differentiable with respect to ``y`` (of a residual also
        to tokens and centres), weights count as constants. The nearest centre always counts: no
        weights underflow to 0 together.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: the clusters' tokens or centres were written to since.
    """
    if not isinstance(y, Tensor) or not y.dtype.is_floating_point:
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y: expected a floating torch.Tensor, got {got}")
    if not isinstance(clusters, Clusters):
        raise TypeError(f"clusters: expected Clusters, got {type(clusters).__name__}")
    b, k, _ = clusters.centres.shape
    if y.dim() != 3 or y.shape[:2] != (b, k):
        raise ValueError(f"y: expected shape ({b}, {k}, C), as the centres, got {tuple(y.shape)}")
    if y.device != clusters.centres.device:
        raise ValueError(
            f"y: expected the centres' device, {clusters.centres.device}, got {y.device}"
        )
    if temperature is None:
        temperature = clusters.temperature
    check_reconstruction(neighbours, temperature, norm, window, residual)
    tokens = clusters.checked_tokens()
    given = (neighbours, temperature, norm, window)
    with reference.full_precision(y.device.type):
        if not residual:
            return _rebuilt(y, clusters, tokens, *given)
        if y.shape != clusters.centres.shape:
            raise ValueError(
                f"y: expected the centres' shape {tuple(clusters.centres.shape)} for residual=True, "
                f"got {tuple(y.shape)}"
            )
        change = reference.wide(y) - reference.wide(clusters.centres)
        return (reference.wide(tokens) + _rebuilt(change, clusters, tokens, *given)).to(y.dtype)


def _rebuilt(
    y: Tensor,
    clusters: Clusters,
    tokens: Tensor,
    neighbours: int,
    temperature: float,
    norm: str,
    window: int | None,
) -> Tensor:
    given = (min(neighbours, y.shape[1]), temperature, norm)
    if window is None:
        return dispatch.reconstruct(y, tokens, clusters.centres, *given)
    size, grid = clusters.size, clusters.grid
    near = reaching(window, grid)
    return local.reconstruct(y, tokens, clusters.centres, size, grid, near, *given)


def check(size: Size, grid: Size, iterations: int, window: int, temperature: float) -> None:
    """Raises as `cluster_tokens` does, for what is known without tokens."""
    for name, pair in (("size", size), ("grid", grid)):
        if not isinstance(pair, (tuple, list, torch.Size)) or len(pair) != 2:
            raise TypeError(f"{name}: expected a pair of whole numbers, got {pair!r}")
        for n in pair:
            _whole(name, n, 1)
    if grid[0] > size[0] or grid[1] > size[1]:
        raise ValueError(
            f"grid: expected at most the map's {size[0]} x {size[1]}, got {grid[0]} x {grid[1]}"
        )
    _whole("iterations", iterations, 0)
    _odd("window", window)
    _positive("temperature", temperature)


def check_reconstruction(
    neighbours: int, temperature: float, norm: str, window: int | None, residual: bool
) -> None:
    """Raises as `reconstruct_tokens` does, for what is known without tokens."""
    _whole("neighbours", neighbours, 1)
    _positive("temperature", temperature)
    if norm not in ("l2", "sum"):
        raise ValueError(f"norm: expected 'l2' or 'sum', got {norm!r}")
    if window is not None:
        _odd("window", window)
    if not isinstance(residual, bool):
        raise TypeError(f"residual: expected True or False, got {residual!r}")


def _whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _odd(name: str, value: int) -> None:
    _whole(name, value, 1)
    if value % 2 == 0:
        raise ValueError(f"{name}: expected an odd number of cells across, got {value}")


def _positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    if value > torch.finfo(torch.float32).max:  # infinite there: times a distance of 0 it is NaN
        raise ValueError(f"{name}: expected a finite number in float32, got {value}")
