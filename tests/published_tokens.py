"""The published formulas of token clustering and reconstruction (arXiv 2210.01035), dense, as read.

Independent of the package, so that it can be its judge, and in the dtype that it is given: squared
distances are sums of squared differences, a window is a mask. Three differences from the published code:
the smallest distance is subtracted before exp, which changes nothing after normalisation but keeps
weights from all being 0; a centre that no token has any affinity to stays; home cells by whole numbers.

And what the tests of token clustering share: maps of tokens, and the judge.
"""

import torch
import torch.nn.functional as F


def squared_distances(x, centres):
    """(B, N, K)"""
    return (x[:, :, None] - centres[:, None]).square().sum(3)


def in_window(size, grid, window):
    """(N, K) bool: whether the cell is in the window around the token's own."""
    near = torch.zeros(*size, *grid, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):
            home = y * grid[0] // size[0], x * grid[1] // size[1]
            rows, columns = (slice(max(0, at - window // 2), at + window // 2 + 1) for at in home)
            near[y, x, rows, columns] = True
    return near.view(size[0] * size[1], -1)


def published_cluster(x, size, grid, *, iterations=5, window=5, temperature=0.02, detached=False):
    """Centres (B, K, C) and the last affinities (B, N, K); `detached`: constants for the gradient."""
    near = in_window(size, grid, window)
    maps = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)
    centres = F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)
    affinity = near.to(x.dtype).expand(x.shape[0], -1, -1)
    for _ in range(iterations):
        d = squared_distances(x, centres) + 1e16 * ~near
        affinity = torch.softmax(-temperature * d, 2) * near
        if detached:
            affinity = affinity.detach()
        total = affinity.sum(1)[..., None]
        found = affinity.transpose(1, 2) @ x / total.where(total > 0, 1)
        centres = torch.where(total > 0, found, centres)
    return centres, affinity


def published_reconstruct(y, x, centres, neighbours, temperature, norm):
    """(B, N, C) of refined centres y; x and centres are those of the clustering."""
    d = squared_distances(x, centres)
    weights = torch.exp(-temperature * (d - d.amin(2, keepdim=True)))
    least = weights.sort(2, descending=True).values[:, :, :neighbours][..., -1:]
    weights = weights * (weights >= least)
    p = 2 if norm == "l2" else 1
    return F.normalize(weights, p=p, dim=2) @ y


def tokens(size, channels, batch=2, dtype=torch.float32, scale=1.0):
    """A map that varies slowly, with noise: neighbours are alike, as in a ViT."""
    coarse = torch.randn(batch, channels, 3, 3)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)
    noise = 0.3 * torch.randn(batch, channels, *size)
    return (scale * (smooth + noise)).flatten(2).transpose(1, 2).contiguous().to(dtype)


def strided(x, how):
    if how == "map":  # (B, C, H, W) seen as tokens: channels are not innermost
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "behind a class token":
        return torch.cat((torch.randn_like(x[:, :1]), x), 1)[:, 1:]
    if how == "every second channel":
        return torch.stack((x, torch.randn_like(x)), 3)[..., 0]
    return x[:1].expand(3, -1, -1)  # one image for all


def assert_as_exact(got, own, truth, dtype):
    """At most twice what the published formulas lose themselves in float32, beside the last rounding."""
    scale = truth.abs().max().item()
    # float32 of the formulas may be right by luck: a few roundings are always allowed.
    lost = max(
        (own.double() - truth).abs().max().item(), 4 * torch.finfo(torch.float32).eps * scale
    )
    rounding = 0.5 * torch.finfo(dtype).eps * scale if dtype != torch.float32 else 0.0
    error = (got.double() - truth).abs().max().item()
    assert error <= 2 * lost + rounding, f"error {error:.3g}, the formulas' own {lost:.3g}"
