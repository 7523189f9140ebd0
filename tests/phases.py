"""The phases of training in plain PyTorch: what every backend's must compute, in any dtype.

q, k and v travel as one tensor `qkv` (3, B, C, H, W). Pairs of q and k are stacked first, except in
the maps with one channel: `spatial`, `pixel` and `logit` are (B, 2, H, W).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Mixed(NamedTuple):
    out: torch.Tensor  # (B, C, H, W)
    spatial: torch.Tensor  # (B, 2, H, W)
    pooled: torch.Tensor  # (2, B, C)
    channel: torch.Tensor  # (2, B, C)


class Combined(NamedTuple):
    grad_qkv: torch.Tensor  # (3, B, C, H, W), the part of v filled in
    grad_sum: torch.Tensor  # (B, C, H, W)
    pixel: torch.Tensor  # (B, 2, H, W)
    channel: torch.Tensor  # (2, B, C)
    dwc_weight: torch.Tensor  # (C, 1, 3, 3)
    dwc_bias: torch.Tensor  # (C,)
    proj_weight: torch.Tensor  # (C, 1, 3, 3)
    proj_bias: torch.Tensor  # (C,)


class Gated(NamedTuple):
    logit: torch.Tensor  # (B, 2, H, W)
    spatial_weight: torch.Tensor  # (2, C)
    sums: torch.Tensor  # (2, 2, C)


def convolve(z, weight, bias=None):
    return F.conv2d(z, weight, bias, padding=1, groups=weight.shape[0])


def convolve_back(grad, weight):
    """The gradient of `convolve` at its input."""
    return convolve(grad, weight.flip(2, 3))


def convolve_weight(grad, z):
    """The gradient of `convolve` at its weight: (C, 1, 3, 3)."""
    height, width = z.shape[2:]
    padded = F.pad(z, (1, 1, 1, 1))
    taps = [
        (grad * padded[:, :, dy : dy + height, dx : dx + width]).sum((0, 2, 3))
        for dy in range(3)
        for dx in range(3)
    ]
    return torch.stack(taps, 1).view(-1, 1, 3, 3)


def per_channel(v):
    return v.view(-1, 1, 1)


def project(x, w):
    return torch.stack(F.conv2d(x, w.qkv_weight, w.qkv_bias).chunk(3, 1))


def statistics(qkv, w):
    """(2, 2, C): of q and k, mean and biased variance of the depthwise convolution."""
    d = [
        convolve(z, g.depthwise_weight, g.depthwise_bias)
        for z, g in zip(qkv[:2], (w.q, w.k), strict=True)
    ]
    return torch.stack(
        [torch.stack((t.mean((0, 2, 3)), t.var((0, 2, 3), correction=0))) for t in d]
    )


def normalized(z, g, mean_var, eps):
    """n^ and n of one gate."""
    mean, var = map(per_channel, mean_var)
    hat = (convolve(z, g.depthwise_weight, g.depthwise_bias) - mean) / (var + eps).sqrt()
    gamma = 1.0 if g.norm_weight is None else per_channel(g.norm_weight)
    beta = 0.0 if g.norm_bias is None else per_channel(g.norm_bias)
    return hat, gamma * hat + beta


def mix(qkv, w, statistics, eps):
    spatial, pooled, channel = [], [], []
    for i, g in enumerate((w.q, w.k)):
        _, n = normalized(qkv[i], g, statistics[i], eps[i])
        spatial.append(torch.sigmoid(F.conv2d(n.relu(), g.spatial_weight)))
        pooled.append((qkv[i] * spatial[i]).mean((2, 3)))
        channel.append(torch.sigmoid(pooled[i] @ g.channel_weight.flatten(1).T))
    spatial, pooled, channel = torch.cat(spatial, 1), torch.stack(pooled), torch.stack(channel)
    hidden = convolve(gated_sum(qkv, spatial, channel), w.dwc_weight, w.dwc_bias)
    return Mixed(convolve(hidden * qkv[2], w.proj_weight, w.proj_bias), spatial, pooled, channel)


def gated_sum(qkv, spatial, channel):
    """q2 + k2."""
    return sum(qkv[i] * spatial[:, i : i + 1] * channel[i][:, :, None, None] for i in range(2))


def backward_combine(grad, qkv, w, spatial, channel):
    v = qkv[2]
    a = gated_sum(qkv, spatial, channel)
    hidden = convolve(a, w.dwc_weight, w.dwc_bias)
    grad_mixed = convolve_back(grad, w.proj_weight)
    grad_hidden = grad_mixed * v
    grad_sum = convolve_back(grad_hidden, w.dwc_weight)
    grad_qkv = torch.full_like(qkv, torch.nan)
    grad_qkv[2] = grad_mixed * hidden
    each = [grad_sum * z for z in qkv[:2]]
    return Combined(
        grad_qkv,
        grad_sum,
        torch.stack(
            [(e * g[:, :, None, None]).sum(1) for e, g in zip(each, channel, strict=True)], 1
        ),
        torch.stack([(e * spatial[:, i : i + 1]).sum((2, 3)) for i, e in enumerate(each)]),
        convolve_weight(grad_hidden, a),
        grad_hidden.sum((0, 2, 3)),
        convolve_weight(grad, hidden * v),
        grad.sum((0, 2, 3)),
    )


def gate_gradient(z, g, mean_var, eps, logit):
    """n^, r and the gradient at n of one gate; logit (B, 1, H, W)."""
    hat, n = normalized(z, g, mean_var, eps)
    return hat, n.relu(), logit * per_channel(g.spatial_weight) * (n > 0)


def backward_gate(qkv, w, statistics, eps, spatial, pixel, shift):
    logit, spatial_weight, sums = [], [], []
    for i, g in enumerate((w.q, w.k)):
        s = spatial[:, i : i + 1]
        inner = pixel[:, i : i + 1] + (shift[i][:, :, None, None] * qkv[i]).sum(1, keepdim=True)
        logit.append(inner * s * (1 - s))
        hat, r, grad_n = gate_gradient(qkv[i], g, statistics[i], eps[i], logit[i])
        spatial_weight.append((logit[i] * r).sum((0, 2, 3)))
        sums.append(torch.stack((grad_n.sum((0, 2, 3)), (grad_n * hat).sum((0, 2, 3)))))
    return Gated(torch.cat(logit, 1), torch.stack(spatial_weight), torch.stack(sums))


def coefficients(w, statistics, eps, sums, count, batch):
    """(2, 3, C): A, B' and D in gd = A gn + B' + D n^. batch: which gates use batch statistics."""
    rows = []
    for i, g in enumerate((w.q, w.k)):
        factor = 1 / (statistics[i, 1] + eps[i]).sqrt()
        factor = factor if g.norm_weight is None else factor * g.norm_weight
        use = 1.0 if batch[i] else 0.0
        rows.append(torch.stack((factor, *(-use / count * factor * s for s in sums[i]))))
    return torch.stack(rows)


def backward_depthwise(
    qkv, w, statistics, eps, spatial, channel, shift, logit, coefficients, grad_sum, grad_qkv
):
    """Fills the parts of q and k in grad_qkv; returns (2, C, 3, 3) and (2, C)."""
    weights, biases = [], []
    for i, g in enumerate((w.q, w.k)):
        hat, _, grad_n = gate_gradient(qkv[i], g, statistics[i], eps[i], logit[:, i : i + 1])
        by_grad, constant, by_hat = map(per_channel, coefficients[i])
        grad_d = by_grad * grad_n + constant + by_hat * hat
        inner = grad_sum * channel[i][:, :, None, None] + shift[i][:, :, None, None]
        grad_qkv[i] = inner * spatial[:, i : i + 1] + convolve_back(grad_d, g.depthwise_weight)
        weights.append(convolve_weight(grad_d, qkv[i]).squeeze(1))
        biases.append(grad_d.sum((0, 2, 3)))
    return torch.stack(weights), torch.stack(biases)


def project_backward(grad_qkv, x, w):
    """Gradients at x, qkv_weight and qkv_bias (3C,)."""
    grad = torch.cat(tuple(grad_qkv), 1)
    weight = w.qkv_weight.flatten(1)
    return (
        torch.einsum("bohw,oc->bchw", grad, weight),
        torch.einsum("bohw,bchw->oc", grad, x).view_as(w.qkv_weight),
        grad.sum((0, 2, 3)),
    )
