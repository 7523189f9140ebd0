"""Bytes that the Triton kernels ask for: the model against the interpreter, and against its goals."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

COUNT = """
import json
import numpy
import torch
import triton.runtime.interpreter as interpreter
from casvit_kernels import FusedCATM
from casvit_kernels.ops.mixer.triton import launch, phases, traffic, tuning

tuning.MULTIPROCESSORS = 1  # so that programs take several images
counts, current = {}, None

def counting(name, mask_of):
    plain = getattr(interpreter.InterpreterBuilder, name)
    def method(self, pointers, *rest):
        item = numpy.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        counts[current] = counts.get(current, 0) + int(mask_of(*rest).data.sum()) * item
        return plain(self, pointers, *rest)
    setattr(interpreter.InterpreterBuilder, name, method)

counting("create_masked_load", lambda mask, *_: mask)
counting("create_masked_store", lambda value, mask, *_: mask)

def forbidden(*_):
    raise AssertionError("an atomic operation")

interpreter.InterpreterBuilder.create_atomic_rmw = forbidden
plain = phases.launch

def run(plan, *rest):
    global current
    current = plan.name
    plain(plan, *rest)

phases.launch = run
found = []
for shape, dtype, layout in CASES:
    x = torch.randn(shape).to(getattr(torch, dtype), memory_format=getattr(torch, layout))
    mixer = FusedCATM(shape[1], backend="triton").to(x.dtype).train()
    counts.clear()
    mixer(x.requires_grad_()).float().square().sum().backward()
    b, c, h, w = shape
    size = traffic.Size(b, c, h, w, x.element_size(), 2 if dtype == "bfloat16" else 4, 1)
    model = {name: traffic.kernel_bytes(name, size) for name in launch.KERNELS}
    found.append([counts == model, dict(counts), model])
print(json.dumps(found))
"""
# Several images in a tile, the last of them alone; several tiles and bands; blocks of channels.
CASES = [
    ((5, 17, 7, 7), "bfloat16", "channels_last"),
    ((5, 17, 7, 7), "float32", "contiguous_format"),
    ((1, 3, 9, 40), "float32", "channels_last"),
    ((1, 3, 9, 40), "float16", "contiguous_format"),
]


@pytest.mark.long
def test_the_model_counts_what_the_interpreter_does():
    pytest.importorskip("triton")
    # Half of the cases in each process.
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COUNT.replace("CASES", repr(part))],
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in (CASES[:2], CASES[2:])
    ]
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        for equal, counted, model in json.loads(out.splitlines()[-1]):
            assert equal, {k: (counted.get(k), n) for k, n in model.items() if n != counted.get(k)}


@pytest.fixture(scope="module")
def bench():
    path = ROOT / "bench" / "static" / "triton_traffic.py"
    spec = importlib.util.spec_from_file_location("triton_traffic", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_goals(bench):
    """All but for what docs/triton_traffic.md explains."""
    missed = bench.missed(256)
    stages = {}
    for stage, column in missed:
        stages.setdefault(column, set()).add(stage)
    assert stages == {
        "gates": {"xs 4"},
        "training forward": {"xs 4", "t 4"},
        "backward": {"xs 3", "xs 4", "t 4"},
    }
    assert missed["xs 4", "gates"] < 0.602
    assert max(missed.values()) < 17.5


def test_table_is_up_to_date(bench):
    assert bench.TABLE.read_text() == bench.table()
