"""The Triton kernels as compiled for GPUs that are not here: spills, widths of loads, one compilation
for all sizes; and the committed table of them all."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("what is interpreted cannot be compiled", allow_module_level=True)

from casvit_kernels.ops.mixer.triton import launch, phases, precompile, tuning  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    path = ROOT / "bench" / "static" / "triton_kernels.py"
    spec = importlib.util.spec_from_file_location("triton_kernels", path)
    module = sys.modules["triton_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(bench):
    document = json.loads(bench.RESULTS.read_text())
    rows = {(r[0], bench.Config(*r[1:6])): bench.Counts(*r[6:]) for r in document["rows"]}
    return document, rows


def _few(bench):
    """Every kernel for every target, with the largest tile or with channels that are masked."""
    for config in bench.configs():
        largest = 512 if config.kernel in ("gates", "backward_gate") else 220
        if config.channels == largest and (config.dtype == "bf16" or config.kernel in bench.SMALL):
            yield config
    for kernel in ("statistics", "gates", "combine"):
        yield bench.Config(kernel, 48, "channels_last", "bf16", "sm_90")


@pytest.mark.long
def test_no_spills_and_wide_loads(bench, committed):
    """A choice of what the table holds, compiled now; the same numbers where Triton is the same."""
    _, rows = committed
    cache = {}
    for config in _few(bench):
        counts = bench.count(config, cache)
        assert counts.spilled == 0, (config, counts)
        assert counts.shared <= bench.MOST_SHARED[config.target], (config, counts)
        if triton.__version__ in bench.VERSIONS:
            assert counts == rows[triton.__version__, config], config
        if config.channels == 48:
            maps = {"statistics": 1, "gates": 1, "combine": 3}[config.kernel]
            stages = tuning.tile(config.kernel, 48).stages
            sixteen = dict(part.split("x") for part in counts.loads.split()).get("16", "0")
            assert int(sixteen) >= maps * stages, (config, counts)


def test_the_committed_table(bench, committed):
    """It is of these kernels, complete for each version of Triton, and spills where the text says so."""
    document, rows = committed
    assert document["source"] == bench.source_hash(), "run python bench/static/triton_kernels.py"
    assert set(rows) == {(v, config) for v in bench.VERSIONS for config in bench.configs()}
    spilled = {key: n.spilled for key, n in rows.items() if n.spilled}
    assert {(version, c.kernel, c.dtype, c.layout) for version, c in spilled} == {
        ("3.6.0", "statistics", "bf16", "NCHW"),
        ("3.6.0", "backward_gate", "bf16", "NCHW"),
        ("3.6.0", "backward_gate", "fp32", "channels_last"),
    }
    assert max(spilled.values()) <= 36
    assert bench.TABLE.read_text() == bench.table(document)
    for (version, config), n in rows.items():
        wide = config.kernel in ("statistics", "gates", "combine") and config.channels % 8 == 0
        if (
            wide
            and (config.layout, config.dtype) == ("channels_last", "bf16")
            and "sm" in config.target
        ):
            assert n.loads.startswith("16x"), (version, config)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [5, 48])
def test_one_compilation_for_all_sizes(bench, channels, dtype, layout, target):
    """What Triton compiles a kernel for does not depend on batch and size: asked of its own binder."""
    edges = [e // s for e in (160, 224, 384) for s in (4, 8, 16, 32)]
    # Real memory, so that alignment is what it is; large batches without.
    shapes = [((b, e, e), "cpu") for b, e in ((1, 2), (1, 5), (3, 7), (2, 12), (1, 16), (1, 33))]
    shapes += [((b, e, e), "meta") for b in (1, 2, 16, 255, 256) for e in edges]
    keys = {}
    for shape, device in shapes:
        for it in precompile.launches(
            channels, dtype, bench.LAYOUTS[layout], shape=shape, device=device
        ):
            *_, (_, found, options) = precompile.specialise(it, target)
            key = repr((found, it.constants, options))
            keys.setdefault(it.name, {})[key] = shape
    assert set(keys) == set(launch.KERNELS)
    assert all(len(k) == 1 for k in keys.values()), keys


def test_a_gradient_inside_a_larger_tensor_is_moved():
    """Its address is no multiple of 16, what else is given to a kernel is."""
    x = torch.zeros(1, 3, 5, 5)
    grad = torch.zeros(1 + x.numel())[1:].view(x.shape)
    assert grad.data_ptr() % phases.ALIGNMENT
    qkv = phases.Projected(torch.zeros(1, 9, 5, 5), torch.zeros((46 + 2 * 3) * 3))
    with launch.recorded() as record:
        phases.TritonPhases().backward_combine(
            grad, x, qkv, None, torch.zeros(1, 2, 5, 5), torch.zeros(2, 1, 3)
        )
    tensors = [a for a in record[0].arguments if isinstance(a, torch.Tensor)]
    assert not [t.shape for t in tensors if t.data_ptr() % phases.ALIGNMENT]
