"""A fused network under compilers and exporters: one operator for those, for these the plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import flat, tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from casvit_kernels import fold_for_inference, fuse_network, use_backend

MEAN, STD = (0.48, 0.45, 0.4), (0.22, 0.23, 0.26)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module: Any, dynamic: bool | None = None) -> tuple[Any, CompileCounterWithBackend]:
    """Without generated code, which would take seconds; and what was compiled."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic), counter


def operators(counter: CompileCounterWithBackend) -> list[str]:
    """The operators of this library in the graphs."""
    return [
        str(node.target)
        for graph in counter.graphs
        for node in graph.graph.nodes
        if "casvit_kernels" in str(node.target)
    ]


def close(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    for g, e in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"fork_feat": True, "out_indices": (1, 3)}])
def test_one_operator(served, context: Any, options: dict[str, Any]) -> None:
    model = tiny(**options)
    net = fuse_network(model)
    run, counter = compiled(net)
    x, other = torch.randn(2, 3, 64, 48), torch.randn(2, 3, 64, 48)
    with context():
        close(run(x), model(x))
        close(run(other), model(other))
    assert operators(counter) == ["casvit_kernels.network"]
    assert len(counter.graphs) == 1
    assert served.calls == 2


def test_dynamic_sizes(served) -> None:
    model = tiny(fork_feat=True)
    run, counter = compiled(fuse_network(model), dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3, 64, 48), (5, 3, 81, 50), (3, 3, 47, 99)):
            x = torch.randn(shape)
            got = run(x)
            close(got, model(x))
    assert len(counter.graphs) == 1
    assert served.calls == 3


def test_inside_a_larger_function(served) -> None:
    model = tiny(fork_feat=True)
    net = fuse_network(model)

    def function(x: Tensor) -> list[Tensor]:
        return [t.relu() + 1 for t in net(x * 2)]

    run, _ = compiled(function)
    x = torch.randn(2, 3, 64, 48).to(memory_format=torch.channels_last)
    with torch.no_grad():
        got = run(x)
        close(got, [t.relu() + 1 for t in model(x * 2)])
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert served.calls == 1


def test_normalised_images(served) -> None:
    net = fuse_network(tiny(), normalize=(MEAN, STD))
    run, _ = compiled(net)
    x = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    with torch.no_grad():
        close(run(x), net(x))
    assert served.calls == 2
    close(run(x), net(x))  # with gradients, by the model


def test_changes_are_seen_without_compiling_again(served) -> None:
    model = tiny()
    run, counter = compiled(fuse_network(model))
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        run(x)
        model.norm.running_mean.add_(1)
        close(run(x), model(x))
        model.network[0][0].norm1 = nn.BatchNorm2d(8).eval()
        close(run(x), model(x))
    assert served.calls == 3
    assert len(counter.graphs) == 1


def test_what_kernels_do_not_compute_any_more(served) -> None:
    model = tiny()
    run, _ = compiled(fuse_network(model))
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        run(x)
        model.network[0][0].mlp.act = nn.SiLU()
        with pytest.warns(UserWarning, match="expected an exact GELU"):
            close(run(x), model(x))
    assert served.calls == 1


def test_outputs_that_changed(served) -> None:
    """The compiled code rests on their sizes: no result instead of a wrong one, then compiled anew."""
    model = tiny()
    run, counter = compiled(fuse_network(model))
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        run(x)
        model.reset_classifier(9)
        with pytest.raises(RuntimeError, match=r"other outputs .* \[\(2, 9\)\].*reset"):
            run(x)
        torch.compiler.reset()
        close(run(x), model(x))
    assert len(counter.graphs) == 2


@pytest.mark.long
def test_gradients_and_training_are_the_models(served) -> None:
    model = tiny()
    net = fuse_network(model)
    run, counter = compiled(net)
    x = torch.randn(4, 3, 64, 48)
    run(x).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for g, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        run(x)
        assert served.calls == 1
        net.train()
        before = model.norm.running_mean.clone()
        assert len(run(x)) == 2
        assert not torch.equal(model.norm.running_mean, before)
        net.eval()
        run(x)
    assert served.calls == 2
    assert len(operators(counter)) == 1


@pytest.mark.long
def test_other_choices_are_the_models(served) -> None:
    model = tiny()
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        run, counter = compiled(fuse_network(model))
        with use_backend("reference"):
            close(run(x), model(x))
        run, more = compiled(fuse_network(copy.deepcopy(model).double()))
        close(run(x.double()), model.double()(x.double()))
    assert operators(counter) == operators(more) == []
    assert served.calls == 0


def test_a_copy_that_was_never_called(served) -> None:
    """Its model is read while the compiler runs."""
    model = tiny()
    run, counter = compiled(copy.deepcopy(fuse_network(model)))
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        close(run(x), model(x))
    assert operators(counter) == ["casvit_kernels.network"]
    assert served.calls == 1


def test_bad_images_when_compiled(served) -> None:
    run = torch.compile(fuse_network(tiny()), backend="aot_eager")
    for x, text in (
        (torch.ones(1, 4, 64, 64), "3 channels"),
        (torch.ones(1, 3, 20, 64), "got 20x64"),
    ):
        with torch.no_grad(), pytest.raises(Exception, match=text):
            run(x)


@pytest.mark.long
def test_generated_code(served) -> None:
    model = tiny(fork_feat=True)
    net = fuse_network(model)
    run = torch.compile(lambda x: [t * 2 for t in net(x)], fullgraph=True)
    with torch.inference_mode():
        for shape in ((2, 3, 64, 48), (3, 3, 50, 70)):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape).to(memory_format=layout)
                close(run(x), [t * 2 for t in model(x)])
    assert served.calls == 4


def test_the_operator_is_registered_right(served) -> None:
    for options in ({}, {"fork_feat": True}):
        net = fuse_network(tiny(**options))
        x = torch.randn(2, 3, 64, 48).to(memory_format=torch.channels_last)
        torch.library.opcheck(torch.ops.casvit_kernels.network.default, (x, net._handle))


def test_a_deleted_network() -> None:
    net = fuse_network(tiny())
    handle = net._handle
    del net
    with pytest.raises(RuntimeError, match="was deleted"):
        torch.ops.casvit_kernels.network(torch.ones(1, 3, 64, 64), handle)


# Graphs that leave the process hold the plain model -----------------------------------------------


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.long)])
def test_export(served, strict: bool) -> None:
    model = tiny()
    program = torch.export.export(fuse_network(model), (torch.randn(2, 3, 64, 48),), strict=strict)
    assert set(program.state_dict) == set(model.state_dict())
    assert not any("casvit_kernels" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(2, 3, 64, 48)
    close(program.module()(x), model(x))
    assert served.calls == 0


def test_export_of_normalised_images(served) -> None:
    net = fuse_network(tiny(), normalize=(MEAN, STD))
    x = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    program = torch.export.export(net, (x,))
    close(program.module()(x), net(x))


def test_traces(served) -> None:
    model = tiny()
    net = fuse_network(model)
    x = torch.randn(2, 3, 64, 48)
    traced = torch.jit.trace(net, x, check_trace=False)
    assert "casvit_kernels::" not in str(traced.inlined_graph)
    symbolic = torch.fx.symbolic_trace(net)
    assert {"head", "patch_embed.0"} <= {str(node.target) for node in symbolic.graph.nodes}
    for other in (traced, symbolic):
        close(other(x + 1), model(x + 1))
    assert served.calls == 0


def test_onnx(served, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    from casvit_kernels.export import to_onnx

    model = tiny()
    report = to_onnx(fuse_network(fold_for_inference(model)), tmp_path / "net.onnx", input_size=64)
    assert report is not None
    assert (tmp_path / "net.onnx").exists()
