"""`casvit-kernels info`: each choice, and that it is the one that a call meets."""

import json
import os
import re

import pytest
import torch
from conftest import require_native, using_instruction_set
from test_cli import run

from casvit_kernels import BackendUnavailable
from casvit_kernels.backends import ENVIRONMENT, Problem, cpu, explain, get, native, select
from casvit_kernels.cli import info
from casvit_kernels.ops.network import dispatch


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def document():
    status, out, _ = run("info", "--json")
    assert status == 0
    return json.loads(out)


def text():
    status, out, _ = run("info")
    assert status == 0
    return out


def line(start):
    rows = re.sub(r"\n {5,}", " ", text())  # lines that go on
    return next(x for x in rows.splitlines() if x.lstrip().startswith(start))


@pytest.mark.parametrize("asked", [None, "reference", "cpu", "triton", "metal"])
@pytest.mark.parametrize("dtype", info.DTYPES)
def test_the_explained_choice_is_the_one_made(asked, dtype, monkeypatch):
    if asked is not None:
        monkeypatch.setenv(ENVIRONMENT, asked)
    choice = explain(problem := Problem("cpu", dtype))
    if choice.error is None:
        assert choice.backend == select(None, problem).name
    else:
        assert choice.backend is None
        with pytest.raises((BackendUnavailable, ValueError), match=re.escape(choice.error)):
            select(None, problem)
    assert choice.asked == (None if asked is None else ENVIRONMENT)
    for passed in choice.passed_over:
        assert passed.reason == get(passed.name).why_not(problem)


def test_an_instruction_set_that_cannot_be_used_is_an_error_here_too(monkeypatch):
    reason = "CASVIT_KERNELS_CPU_ISA='amx' cannot be used: it is not there"
    monkeypatch.setenv(native.ISA_ENVIRONMENT, "amx")
    monkeypatch.setattr(type(get("cpu")), "why_not", lambda self, problem=None: reason)
    choice = explain(Problem("cpu", torch.float32))
    assert (choice.backend, choice.error) == (None, reason)
    with pytest.raises(BackendUnavailable, match="it is not there"):
        select(None, Problem("cpu", torch.float32))


def test_choices_on_the_cpu():
    require_native()
    found = {c["dtype"]: c for c in document()["choices"] if c["device"] == "cpu"}
    assert {name: c["backend"] for name, c in found.items()} == {
        "float32": "cpu", "bfloat16": "cpu", "float16": "cpu", "float64": "reference",
    }  # fmt: skip
    assert found["float32"]["passed_over"] == []
    first = found["float64"]["passed_over"][0]
    assert first["name"] == "cpu"
    active = cpu.active_instruction_set()
    assert line("cpu, float32, bfloat16, float16").endswith(f"cpu ({active})")
    assert line("cpu, float64").endswith(f"reference; not cpu: {first['reason']}")


def test_choices_on_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100")
    why = {"cuda": "it computes bfloat16 and float16", "triton": "it computes no float64"}
    able = {"cuda": (torch.bfloat16, torch.float16), "triton": info.DTYPES[:3]}
    for name, dtypes in able.items():

        def why_not(self, problem=None, name=name, dtypes=dtypes):
            return None if problem is None or problem.dtype in dtypes else why[name]

        monkeypatch.setattr(type(get(name)), "why_not", why_not)
    found = [c for c in document()["choices"] if c["device"] == "cuda:0"]
    assert [c["backend"] for c in found] == ["triton", "cuda", "cuda", "reference"]
    assert {c["gpu"] for c in found} == {"NVIDIA H100"}
    title = "cuda:0 (NVIDIA H100), "
    assert line(f"{title}bfloat16, float16").endswith("  cuda")
    assert line(f"{title}float32").endswith(f"triton; not cuda: {why['cuda']}")
    rest = f"reference; not cuda: {why['cuda']}; not triton: {why['triton']}"
    assert line(f"{title}float64").endswith(rest)


def test_a_backend_that_was_asked_for(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "reference")
    served = line("cpu, float32, bfloat16, float16, float64")
    assert served.endswith(f"reference, as {ENVIRONMENT} asks")
    assert f"{ENVIRONMENT}=reference" in text()
    assert document()["variables"][0]["value"] == "reference"
    if document()["whole_network"]["precisions"]:
        assert f"not served: {ENVIRONMENT} asks for the reference" in line("whole networks")
    monkeypatch.setenv(ENVIRONMENT, "metal")
    assert f"an error: {ENVIRONMENT}: expected one of" in line("cpu, float32")


def test_variables_that_are_set(monkeypatch):
    for variable in document()["variables"]:
        monkeypatch.delenv(variable["name"])
    assert document()["variables"] == []
    assert text().endswith("Environment variables that are set: none that matters here\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (variable,) = document()["variables"]
    assert (variable["name"], variable["value"]) == ("OMP_NUM_THREADS", "2")
    assert line("OMP_NUM_THREADS=2").endswith(variable["effect"])
    assert document()["threads"]["set_by"] == ["OMP_NUM_THREADS=2"]


def test_threads():
    torch.set_num_threads(3)
    of = document()["threads"]
    assert of["torch"] == 3
    assert 1 <= of["allowed"] <= of["cpus"] == os.cpu_count()
    assert f" {of['allowed']} of {of['cpus']} CPUs for this process" in line("threads")


def test_precisions_of_whole_networks_that_are_missing(monkeypatch):
    require_native()
    monkeypatch.setattr(info.benchmark, "precisions", lambda: ["fp32"])
    reason = document()["whole_network"]["without"]["bf16"]
    assert reason == dispatch.why_not_precision("bf16")
    assert line("whole networks in bf16").endswith(f"no: {reason}")


def test_the_instruction_set_in_use(monkeypatch):
    require_native()
    monkeypatch.delenv(native.ISA_ENVIRONMENT, raising=False)
    best = next(name for name, reason in cpu.instruction_sets().items() if reason is None)
    with using_instruction_set(best):
        assert line(best).endswith("usable, in use: the best that this CPU and this build have")
    monkeypatch.setenv(native.ISA_ENVIRONMENT, "portable")
    with using_instruction_set("portable"):
        assert line("portable").endswith(f"usable, in use: {native.ISA_ENVIRONMENT} asks for it")
        found = document()["whole_network"]
        assert found["precisions"] == ["fp32"]
        assert found["without"]["bf16"].endswith("in use is portable")


def test_no_line_is_wider_than_a_terminal():
    wide = [x for x in text().splitlines() if len(x) > 80 and " " in x.strip()[40:]]
    assert wide == []
