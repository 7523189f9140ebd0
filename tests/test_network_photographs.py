"""A whole network in bf16 on photographs: the classes that float64 finds, and as near as bf16 comes."""

import copy

import pytest
import torch
from conftest import require_native

from casvit_kernels import fuse_network
from casvit_kernels.demo import whole
from casvit_kernels.ops.network import cpu


def test_bf16_finds_the_same_classes():
    require_native()
    if not cpu.has_precision("bf16"):
        pytest.skip("no bf16 on this CPU")
    model, x = whole.problem("rcvit_xs", 1)
    with torch.inference_mode():
        exact = torch.cat([copy.deepcopy(model).double()(image[None].double()) for image in x])
        got = fuse_network(model, precision="bf16")(x)
    assert torch.equal(got.argmax(1), exact.argmax(1))
    # Operands of bf16 have 8 bits; a whole network in bf16, activations too, is twice as far off.
    assert (got - exact).abs().max() < 0.01 * exact.abs().max()
