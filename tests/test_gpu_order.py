"""Which of `cuda` and `triton` comes first: as measured, else as the static model predicts."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from bench.gpu.store import sources
from bench.report import command as report
from bench.report.gpu_order import measured, module, predicted
from bench.report.load import load_gpu
from casvit_kernels import BackendUnavailable, backends, use_backend
from casvit_kernels.backends import Problem, get, gpu_numbers, gpu_order, select
from casvit_kernels.cli import main

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "bench" / "results" / "cuda_kernels.json"
HALF = Problem("cuda", torch.bfloat16, 48, 0)


@pytest.fixture
def gpu(monkeypatch):
    """Sets what is there: `gpu((9, 0))`, where both backends can be used but for what they refuse."""

    def set_up(*capabilities, refused=()):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
        for name in ("cuda", "triton"):
            reason = "it is broken" if name in refused else None
            monkeypatch.setattr(get(name), "why_not", lambda problem=None, r=reason: r)

    return set_up


def choices():
    return select(None, HALF).name, [s.name for s in backends()][1:3]


def test_without_a_measurement_the_static_model_decides(gpu, monkeypatch):
    gpu((9, 0))
    assert choices() == ("cuda", ["cuda", "triton"])
    order = gpu_order.order((9, 0))
    assert not order.measured
    assert "predicted by the static model for sm_90, not measured: 89 instruct" in order.why
    assert gpu_order.order((8, 9)) == gpu_order.order((8, 0))
    monkeypatch.setitem(gpu_order.PREDICTED, (9, 0), (171.0, 170.0))
    assert choices() == ("triton", ["triton", "cuda"])


def test_a_measurement_turns_the_order_round(gpu, monkeypatch):
    gpu((9, 0), (12, 0))
    monkeypatch.setitem(gpu_order.MEASURED, (9, 0), ("NVIDIA H100", 0.8, 16))
    assert select(None, HALF).name == "triton"
    assert select(None, HALF._replace(ordinal=1)).name == "cuda"  # another architecture
    assert choices()[1] == ["cuda", "triton"]  # of the newest
    monkeypatch.setitem(gpu_order.MEASURED, (9, 0), ("NVIDIA H100", 1.3, 16))
    assert select(None, HALF).name == "cuda"


def test_who_was_asked_for_serves_or_refuses(gpu, monkeypatch):
    monkeypatch.setitem(gpu_order.MEASURED, (9, 0), ("NVIDIA H100", 0.8, 16))
    gpu((9, 0))
    assert select("cuda", HALF).name == "cuda"
    with use_backend("cuda"):
        assert select(None, HALF).name == "cuda"
    gpu((9, 0), refused=["triton"])
    assert select(None, HALF).name == "cuda"
    with pytest.raises(BackendUnavailable, match=r"backend='triton' cannot serve .* it is broken"):
        select("triton", HALF)


def test_info_says_which_and_why(gpu, monkeypatch, capsys):
    monkeypatch.setitem(gpu_order.MEASURED, (9, 0), ("NVIDIA H100", 0.8, 16))
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "there is no GPU here" in text
        assert "compute capability 8.0   cuda, predicted by the static model for sm_80" in text
    gpu((9, 0))
    assert main(["info", "--json"]) == 0
    (of,) = json.loads(capsys.readouterr().out)["gpu_order"]
    assert (of["gpu"], of["capability"], of["first"]) == ("GPU 0", "9.0", "triton")
    assert of["measured"]
    assert of["why"] == (
        "measured on NVIDIA H100: triton takes 0.80 times as long as cuda "
        "(geometric mean of 16 timings)"
    )


# The numbers that the package ships.


def document(backend, medians, version="a", part="mixer", **case):
    """Of a GPU run: times of the fused mixer by batch."""
    cases = [
        {
            "id": f"xs-{batch}",
            "level": part,
            "dtype": "bfloat16",
            "mixer_shapes": [[batch, 48, 56, 56]],
            "rows": [
                {"candidate": "fused channels_last bf16", "median_s": s},
                {"candidate": "eager bf16", "median_s": 1.0},
                {"candidate": "fused graph channels_last bf16", "error": "out of memory"},
            ],
            **case,
        }
        for batch, s in medians.items()
    ]
    stamp = {"device": "NVIDIA H100", "torch": "2.15", "version": version, "backend": backend}
    return {
        "stamp": {**stamp, "quick": False},
        "settings": {},
        "environment": {"device": "cuda", "capability": "9.0", "gpu": "NVIDIA H100"},
        "cases": cases,
    }


def test_ratios_are_of_what_both_were_timed_on():
    triton = document("triton", {1: 2.0, 2: 8.0, 4: 1.0})
    cuda = document("cuda", {1: 1.0, 2: 1.0, 8: 1.0})
    found = measured({"h100": {"mixer": cuda}, "h100-triton": {"mixer": triton}})
    assert found == {(9, 0): ("NVIDIA H100", 4.0, 2)}
    for other in (
        document("triton", {1: 2.0}, version="b"),
        document("triton", {1: 2.0}, dtype="float32"),
        document("cuda", {1: 2.0}),
    ):
        assert measured({"h100": {"mixer": cuda}, "other": {"mixer": other}}) == {}


@pytest.mark.parametrize("passed", [True, False])
def test_no_ratio_without_parity(passed, tmp_path):
    for backend, seconds in (("cuda", 1.0), ("triton", 0.5)):
        folder = tmp_path / f"nvidia-h100-{backend}"
        folder.mkdir()
        timed = document(backend, {1: seconds})
        verdict = {"id": f"{backend}-bfloat16-channels_last-eval-1x48x56x56-0-cuda"}
        parity = {**timed, "cases": [{**verdict, "passed": passed or backend == "cuda"}]}
        (folder / "mixer.json").write_text(json.dumps(timed))
        (folder / "parity.json").write_text(json.dumps(parity))
    found = measured(load_gpu(tmp_path))
    assert found == ({(9, 0): ("NVIDIA H100", 0.5, 1)} if passed else {})


def test_the_package_reads_what_the_report_writes(tmp_path):
    """The mean of a mixer that Triton computes as fast, and of one in half the time."""
    gpus = {
        backend: {
            "mixer": document(backend, {1: 1.0}),
            "training": document(backend, {1: seconds}, part="training"),
        }
        for backend, seconds in (("cuda", 2.0), ("triton", 1.0))
    }
    path = tmp_path / "gpu_numbers.py"
    path.write_text(module(STATIC, gpus))
    found = runpy.run_path(str(path))
    assert found["PREDICTED"] == gpu_numbers.PREDICTED
    assert found["MEASURED"] == {(9, 0): ("NVIDIA H100", 0.707, 2)}


def test_the_shipped_numbers_are_of_the_committed_results():
    """And no result is stale for them."""
    path = ROOT / "casvit_kernels" / "backends" / "gpu_numbers.py"
    assert report.outputs(ROOT)[path] == path.read_text()
    assert predicted(json.loads(STATIC.read_text())) == gpu_numbers.PREDICTED
    assert path.relative_to(ROOT).as_posix() not in sources()
