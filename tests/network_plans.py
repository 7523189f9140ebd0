"""Plans of small networks with random weights, for the tests of their kernels."""

import torch

from casvit_kernels.ops.network.plan import LOGITS, MAP, MAPS, POOLED, Plan, Stage

# Channels that fill no vector, odd ones (bf16 takes them in pairs), a stage without blocks.
PLANS = {
    "logits": Plan(
        3, 24, False, (Stage(48, (96, 192), False), Stage(56, (224,), False)), LOGITS, 37
    ),
    "maps": Plan(
        4, 7, False, (Stage(13, (29,), True), Stage(33, (), True), Stage(21, (50,), True)), MAPS, 0
    ),
    "pooled": Plan(1, 9, False, (Stage(20, (80,), False), Stage(35, (61,), False)), POOLED, 0),
    "map": Plan(3, 26, False, (Stage(17, (68,), True), Stage(40, (160,), False)), MAP, 0),
    "normalized": Plan(
        3, 16, True, (Stage(16, (64,), False), Stage(32, (128,), False)), LOGITS, 10
    ),
}


def random_weights(plan, seed=0):
    """Of the size that keeps maps near 1; the means of a normalized plan are in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(plan.weight_count(), generator=generator) * 0.15
    if plan.normalized:
        weights[: plan.in_chans] = torch.rand(plan.in_chans, generator=generator)
    return weights


def outputs(plan, x, fill=float("nan"), channels_last=False):
    """What kernels are to fill."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.full(shape, fill).contiguous(
            memory_format=layout if len(shape) == 4 else torch.contiguous_format
        )
        for shape in plan.output_shapes(x.shape[0], x.shape[2], x.shape[3])
    ]
