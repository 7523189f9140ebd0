"""`bench --network`, `info` and the demo's row: a whole network beside what else serves it."""

import json

import pytest
import torch
from test_cli import refused, run

from casvit_kernels import BackendUnavailable, benchmark
from casvit_kernels._optional import MissingExtra
from casvit_kernels.benchmark import Exactness, NetworkSpeed, Race, Timing
from casvit_kernels.cli import bench
from casvit_kernels.demo import check, network, whole
from casvit_kernels.models import rcvit_xs

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def found(precision="fp32", refused=None, **medians):
    """Of 1 image at a time, 2 GMAC each and a peak of 1000 GMAC/s."""
    suffix = " bf16" if precision == "bf16" else ""
    race = Race(refused=refused)
    exactness = {}
    for name, seconds in medians.items():
        name = name.replace("_", " ") + suffix
        race.timings[name] = Timing(seconds, seconds, seconds, 3, 1, (seconds,) * 3)
        race.facts[name] = {"precision": "f32"} if name.startswith("openvino") else {}
        exactness[name] = Exactness(1e-7, 8)
    race.timings.absent["onnxruntime"] = "not installed"
    race.failed["compile"] = "its process ended with status -9"
    return NetworkSpeed(1, precision, 8, 2 * 10**9, race, exactness, [1e12])


MEDIANS = {"eager": 0.016, "openvino": 0.008, "fused_network": 0.004}


def test_the_table_has_the_fastest_first_and_names_what_is_missing():
    text = bench._network_text("rcvit_xs", whole.summary(found(**MEDIANS)))
    head, _, *rows = text.splitlines()
    assert head.startswith("rcvit_xs, fp32, 1 image ")
    assert rows[0].split() == ["fused", "network", "4", "ms", "2.00x", "1.00e-07", "8", "0.50"]
    assert rows[1].split() == ["openvino", "(f32)", "8", "ms", "1.00x", "1.00e-07", "8", "0.25"]
    assert rows[2].split()[0] == "eager"
    assert "Not measured: onnxruntime (not installed)." in text
    assert "compile (its process ended with status -9)" in text
    assert "1000 GMAC/s" in text


def test_without_a_rival_or_a_peak_nothing_is_divided():
    speed = found(fused_network=0.004)
    speed.peaks.clear()
    text = bench._network_text("rcvit_xs", whole.summary(speed))
    assert text.splitlines()[2].split() == ["fused", "network", "4", "ms", "1.00e-07", "8"]
    assert "peak is not known here" in text


@pytest.fixture
def asked(monkeypatch):
    """What `bench --network` measures, without measuring it."""
    calls = []

    def measure(model, x, **options):
        calls.append((x.shape, options))
        return found(options["precision"], **MEDIANS)

    monkeypatch.setattr(whole, "measure", measure)
    return calls


def test_bench_of_whole_networks_in_each_precision(asked, monkeypatch):
    monkeypatch.setattr(benchmark, "precisions", lambda: ["fp32", "bf16"])
    status, out, err = run("bench", "--network", "--batch", 3, "--json")
    assert status == 0, err
    document = json.loads(out)
    assert [n["precision"] for n in document["networks"]] == ["fp32", "bf16"]
    assert document["environment"]["openvino"] == benchmark.environment()["openvino"]
    rows = document["networks"][0]["rows"]
    assert [row["name"] for row in rows] == ["fused network", "openvino", "eager"]
    assert rows[0]["share_of_peak"] == pytest.approx(0.5)
    assert [tuple(shape) for shape, _ in asked] == [(9, 3, 224, 224)] * 2  # a multiple of the batch
    assert asked[0][1]["names"] == benchmark.names_for("fp32")
    run("bench", "--network", "--quick")
    assert asked[2][1]["names"] == benchmark.names_for("fp32", quick=True)
    assert asked[2][1]["starts"] == 1


def test_a_network_that_is_not_exact_fails_the_command(monkeypatch):
    reason = "parity failed, nothing was timed: fused network"
    monkeypatch.setattr(whole, "measure", lambda *_, **options: found(refused=reason))
    status, out, _ = run("bench", "--network", "--quick")
    assert status == 1
    assert reason in out


def test_stages_and_whole_networks_are_one_or_the_other():
    assert "--stage: expected none with --network" in refused("bench", "--network", "--stage", 1)


def test_info_says_what_serves_a_whole_network(monkeypatch):
    found = json.loads(run("info", "--json")[1])["whole_network"]
    assert found["precisions"] == benchmark.precisions()
    monkeypatch.setattr(benchmark, "precisions", lambda: ["fp32", "bf16"])
    line = next(x for x in run("info")[1].splitlines() if "fuse_network" in x)
    assert line.endswith(f"{found['instruction_set']}, in fp32 and bf16")
    monkeypatch.setattr(benchmark, "precisions", list)
    line = next(x for x in run("info")[1].splitlines() if "fuse_network" in x)
    assert line.endswith("no kernels: the model computes by itself")


@pytest.fixture
def exports(monkeypatch):
    """The exports made, and the file that `time_network` was given each time."""
    log = []

    def to_onnx(model, path, *, example_input, verify):
        log.append(tuple(example_input.shape))
        open(path, "w").close()

    def time_network(model, x, *, onnx, **options):
        log.append(None if onnx is None else onnx.is_file())

    monkeypatch.setattr(whole, "to_onnx", to_onnx)
    monkeypatch.setattr(benchmark, "time_network", time_network)
    return log


def test_a_file_is_written_for_those_that_read_one(exports, monkeypatch):
    x = torch.zeros(8, 3, 64, 64)
    whole.measure(None, x, batch=2, precision="bf16")
    assert exports == [(2, 3, 64, 64), True]
    whole.measure(None, x, batch=2, precision="fp32", names=["eager"])
    assert exports[2:] == [None]

    def missing(*_, **__):
        raise MissingExtra("onnx")

    monkeypatch.setattr(whole, "to_onnx", missing)
    whole.measure(None, x, batch=2, precision="fp32")
    assert exports[3:] == [None]


@pytest.mark.parametrize(("batch", "count"), [(1, 8), (3, 9), (16, 16)])
def test_problems_have_enough_photographs_and_their_statistics(batch, count):
    model, x = whole.problem("rcvit_xs", batch, size=64)
    assert x.shape == (count, 3, 64, 64)
    assert not model.training
    with torch.no_grad():
        assert len(model(x).argmax(1).unique()) > 1  # not one class for all


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = rcvit_xs(num_classes=3).eval()
    return model, torch.randn(2, 3, 64, 64)


def test_the_demo_checks_the_network_in_one_call(tiny, monkeypatch):
    model, x = tiny
    inputs = network.mixer_inputs(model, x)
    right = check.check(model, model, x, inputs, lambda: None)
    assert (right.network is not None) == bool(benchmark.precisions())
    assert right.passed
    wrong = lambda plain: lambda images: plain(images) * 1.001  # noqa: E731
    monkeypatch.setattr(benchmark, "network_of", wrong)
    parity = check.check(model, model, x, inputs, lambda: None)
    assert not parity.passed
    assert parity.outputs[-1] is parity.network
    assert not parity.network.passed


def test_a_candidate_without_kernels_is_absent(tiny, monkeypatch):
    model, x = tiny
    calls = benchmark.model_candidates(model, x, include=["fused network", "eager"])
    with torch.inference_mode():
        if benchmark.precisions():
            torch.testing.assert_close(calls["fused network"](), calls["eager"]())
    from casvit_kernels.benchmark import candidates

    monkeypatch.setattr(candidates.dispatch, "chosen", lambda: None)
    timings = benchmark.interleave(
        benchmark.model_candidates(model, x, include=["fused network"]), rounds=1
    )
    assert timings.absent == {"fused network": "there are no kernels for whole networks here"}

    def refuse(*_, **__):
        raise BackendUnavailable("no bf16 here")

    monkeypatch.setattr(candidates, "fuse_network", refuse)
    with pytest.raises(benchmark.Unavailable, match="no bf16 here"):
        benchmark.network_of(model, bf16=True)


@pytest.mark.long
def test_bench_of_a_whole_network_for_real():
    argv = ("bench", "--network", "--quick", "--batch", 1, "--threads", 1, "--json")
    status, out, err = run(*argv)
    assert status == 0, err
    for result in json.loads(out)["networks"]:
        names = {row["name"] for row in result["rows"]}
        ours = "fused network" + (" bf16" if result["precision"] == "bf16" else "")
        assert (ours in names) == bool(benchmark.precisions())
        for row in result["rows"]:
            assert 0 < row["p25"] <= row["seconds"] <= row["p75"]
            if row["share_of_peak"] is not None:
                assert 0 < row["share_of_peak"] < 1
