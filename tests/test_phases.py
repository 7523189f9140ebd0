"""The phases in plain PyTorch, put together, are the reference and its gradients (float64)."""

import phases
import pytest
import torch
import torch.nn.functional as F

from casvit_kernels.ops.mixer.reference import catm, running_norm
from casvit_kernels.ops.mixer.weights import GateWeights, MixerWeights, flatten, unflatten

EPS = (1e-5, 1e-3)
STATISTICS = (6, 7, 14, 15)  # where the running ones are in flatten
BATCH = [(True, True), (False, False), (True, False)]


def weights(C, bias=True, affine=True):
    def gate():
        return GateWeights(
            torch.randn(C, 1, 3, 3),
            torch.randn(C),
            torch.randn(C) if affine else None,
            torch.randn(C) if affine else None,
            0.3 * torch.randn(C),
            torch.rand(C) + 0.5,
            torch.randn(1, C, 1, 1) * C**-0.5,
            torch.randn(C, C, 1, 1) * C**-0.5,
        )

    return MixerWeights(
        torch.randn(3 * C, C, 1, 1) * C**-0.5,
        torch.randn(3 * C) if bias else None,
        gate(),
        gate(),
        torch.randn(C, 1, 3, 3),
        torch.randn(C),
        torch.randn(C, 1, 3, 3),
        torch.randn(C),
    )


def batch_norm(w, eps):
    return lambda d: F.batch_norm(d, None, None, w.norm_weight, w.norm_bias, True, 0.0, eps)


def by_phases(x, w, grad, batch):
    """out, and the gradients of x and the weights as in (x, *flatten(w))."""
    B, _, H, W = x.shape
    qkv = phases.project(x, w)
    running = torch.stack([torch.stack((g.norm_mean, g.norm_var)) for g in (w.q, w.k)])
    use = torch.tensor(batch).view(2, 1, 1)
    statistics = torch.where(use, phases.statistics(qkv, w), running)
    mixed = phases.mix(qkv, w, statistics, EPS)

    b1 = phases.backward_combine(grad, qkv, w, mixed.spatial, mixed.channel)
    grad_logit = b1.channel * mixed.channel * (1 - mixed.channel)
    channel_weight = torch.einsum("ibo,ibc->ioc", grad_logit, mixed.pooled)
    channel = torch.stack([g.channel_weight.flatten(1) for g in (w.q, w.k)])
    shift = grad_logit @ channel / (H * W)
    b2 = phases.backward_gate(qkv, w, statistics, EPS, mixed.spatial, b1.pixel, shift)
    coefficients = phases.coefficients(w, statistics, EPS, b2.sums, B * H * W, batch)
    depthwise = phases.backward_depthwise(
        qkv,
        w,
        statistics,
        EPS,
        mixed.spatial,
        mixed.channel,
        shift,
        b2.logit,
        coefficients,
        b1.grad_sum,
        b1.grad_qkv,
    )
    x_grad, qkv_weight, qkv_bias = phases.project_backward(b1.grad_qkv, x, w)
    gates = [
        GateWeights(
            depthwise[0][i].unsqueeze(1),
            depthwise[1][i],
            b2.sums[i, 1],
            b2.sums[i, 0],
            None,
            None,
            b2.spatial_weight[i].view(1, -1, 1, 1),
            channel_weight[i][:, :, None, None],
        )
        for i in range(2)
    ]
    grads = MixerWeights(
        qkv_weight,
        qkv_bias,
        *gates,
        b1.dwc_weight,
        b1.dwc_bias,
        b1.proj_weight,
        b1.proj_bias,
    )
    return mixed.out, (x_grad, *flatten(grads))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 1, 7), (3, 5, 6, 4)], ids=str)
@pytest.mark.parametrize("batch", BATCH, ids=str)
@pytest.mark.parametrize("parts", [True, False])
def test_the_phases_are_the_gradients(shape, batch, parts):
    torch.set_default_dtype(torch.float64)
    try:
        w = weights(shape[1], bias=parts, affine=parts)
        x, grad = torch.randn(shape), torch.randn(shape)
    finally:
        torch.set_default_dtype(torch.float32)
    out, found = by_phases(x, w, grad, batch)

    inputs = [x, *flatten(w)]
    for i, t in enumerate(inputs):
        if t is not None and i - 1 not in STATISTICS:
            t.requires_grad_()
    w = unflatten(tuple(inputs[1:]))
    norms = [
        batch_norm(g, e) if b else running_norm(g, e)
        for g, e, b in zip((w.q, w.k), EPS, batch, strict=True)
    ]
    expected_out = catm(x, w, *norms)
    expected_out.backward(grad)
    torch.testing.assert_close(out, expected_out.detach(), rtol=1e-10, atol=1e-10)
    for i, t in enumerate(inputs):
        if t is not None and i - 1 not in STATISTICS:
            torch.testing.assert_close(
                found[i], t.grad, rtol=1e-10, atol=1e-10, msg=lambda m, i=i: f"{i}: {m}"
            )
