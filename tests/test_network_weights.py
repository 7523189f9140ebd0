"""The flat weights of a network and the formula over them: the contract that kernels are written to."""

from __future__ import annotations

import torch
from networks import assert_right, tiny, trained
from torch import Tensor, nn

from casvit_kernels.ops.network import fold, reference
from casvit_kernels.ops.network.kernels import FormulaKernels
from casvit_kernels.ops.network.plan import Plan
from casvit_kernels.surgery.find import find

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def weights_of(model: nn.Module, normalize: fold.Normalize | None = None) -> tuple[Plan, Tensor]:
    found = find(model)
    plan = found.plan._replace(normalized=normalize is not None)
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return plan, fold.flat(found.sources, plan, tensors.__getitem__, normalize)


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def test_order() -> None:
    """Each place of the list, by hand, of a network with one of everything."""
    model = tiny(fork_feat=True, out_indices=(0,))
    model.network[0][0].attn.qkv = nn.Conv2d(8, 24, 1)  # with a bias
    plan, flat = weights_of(model)
    block = model.network[0][0]
    expected: list[Tensor] = []

    def layer(
        conv: nn.Module, after: nn.Module | None = None, before: nn.Module | None = None
    ) -> None:
        weight, bias = conv.weight.double(), conv.bias.double()  # type: ignore[operator,union-attr]
        if after is not None:
            scale, shift = affine(after)  # type: ignore[arg-type]
            weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
        if before is not None:
            scale, shift = affine(before)  # type: ignore[arg-type]
            bias = bias + weight.flatten(1) @ shift
            weight = weight * scale.view(1, -1, 1, 1)
        expected.extend((weight, bias))

    stem, local, mixer = model.patch_embed, block.local_perception.network, block.attn
    layer(stem[0], stem[1])
    layer(stem[3], stem[4])
    layer(local[0], local[1])
    layer(local[2])
    layer(local[4])
    layer(mixer.qkv, before=block.norm1)
    for gate in (mixer.oper_q, mixer.oper_k):
        layer(gate[0].block[0], gate[0].block[1])
        expected += [gate[0].block[3].weight, gate[1].block[1].weight]
    layer(mixer.dwc)
    layer(mixer.proj)
    layer(block.mlp.fc1, before=block.norm2)
    layer(block.mlp.fc2)
    expected += affine(model.norm0)
    by_hand = torch.cat([t.detach().double().flatten() for t in expected])
    assert flat.shape == by_hand.shape == (plan.weight_count(),)
    torch.testing.assert_close(flat, by_hand, rtol=1e-12, atol=1e-12)


def test_heads_and_embeddings() -> None:
    model = tiny()
    plan, flat = weights_of(model)
    scale, shift = affine(model.norm)
    weight = (model.head.weight + model.dist_head.weight).double() / 2
    bias = (model.head.bias + model.dist_head.bias).double() / 2
    torch.testing.assert_close(flat[-5:], bias + weight @ shift)
    torch.testing.assert_close(flat[-105:-5], (weight * scale).flatten())
    model.reset_classifier(0)
    plan, flat = weights_of(model)
    torch.testing.assert_close(flat[-40:], torch.cat([scale, shift]))
    model.norm = nn.Identity()
    assert weights_of(model)[1][-40:].tolist() == [1.0] * 20 + [0.0] * 20
    assert plan.weight_count() == flat.numel()


def test_the_formula_is_the_model() -> None:
    x = torch.rand(2, 3, 45, 38, dtype=torch.float64)
    for options in ({}, {"fork_feat": True}, {"num_classes": 0, "in_chans": 3}):
        model = tiny(**options)
        plan, flat = weights_of(model)
        wide = model.double()
        expected = wide(x)
        expected = list(expected) if isinstance(expected, list) else [expected]
        for got, e in zip(reference.compute(x, flat, plan), expected, strict=True):
            torch.testing.assert_close(got, e, rtol=1e-9, atol=1e-9)
        assert [tuple(e.shape) for e in expected] == plan.output_shapes(2, 45, 38)


def test_the_formula_normalises() -> None:
    model = tiny()
    plan, flat = weights_of(model, (MEAN, STD))
    assert flat[:3].tolist() == list(MEAN)
    pixels = torch.randint(0, 256, (2, 3, 45, 38), dtype=torch.uint8)
    share = pixels.double() / 255
    mean, std = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (MEAN, STD))
    expected = model.double()((share - mean) / std)
    for x in (pixels, share):
        (got,) = reference.compute(x, flat, plan)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_formulas_keep_the_contract() -> None:
    """What tests put in the kernels' place writes into the outputs that it was given."""
    model = trained(tiny(fork_feat=True))
    plan, flat = weights_of(model)
    formulas = FormulaKernels()
    ints = plan.to_ints()
    packed = formulas.pack(flat.float(), ints, 0)
    assert packed.dtype == torch.uint8
    x = torch.randn(2, 3, 40, 48)
    outs = [torch.full(s, float("nan")) for s in plan.output_shapes(2, 40, 48)]
    scratch = torch.empty(formulas.scratch(ints, (2, 40, 48), 0, 1), dtype=torch.uint8)
    formulas.infer(x, packed, ints, 0, 1, scratch, outs)

    class Given(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return outs

    assert_right(Given(), model, x)
