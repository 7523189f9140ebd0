"""Interleaved measurement: order, statistics, and what it says about what it cannot measure."""

import gc
import importlib.util
import json

import pytest
import torch
from conftest import require_native

from casvit_kernels import BackendUnavailable, FusedCATM, benchmark
from casvit_kernels.benchmark import Timing, interleave, mixer_candidates, ratio_to_best
from casvit_kernels.models import rcvit_xs
from casvit_kernels.ops.mixer.reference import AdditiveTokenMixer


class Clock:
    """Stands still but for the candidates, which take the time they are told."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def candidate(self, name, *costs):
        """Costs `costs` seconds, call by call, then again the last one."""
        left = list(costs)

        def call():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_every_round_calls_every_candidate_in_rotated_order():
    clock = Clock()
    candidates = {name: clock.candidate(name, 1.0) for name in "abc"}
    interleave(candidates, rounds=4, min_round_seconds=0.5, pause_seconds=0, clock=clock)
    rounds = "".join(clock.log)[-12:]
    assert rounds == "abc" + "bca" + "cab" + "abc"


def test_median_and_quartiles_are_over_the_rounds_per_call():
    clock = Clock()
    # One warm-up call, one to choose the number of calls, then five rounds.
    call = clock.candidate("a", 100.0, 9.0, 4.0, 2.0, 8.0, 6.0, 10.0)
    found = interleave({"a": call}, rounds=5, min_round_seconds=1, pause_seconds=0, clock=clock)
    assert found["a"] == Timing(6.0, 4.0, 8.0, 5, 1, (4.0, 2.0, 8.0, 6.0, 10.0))


def test_each_candidate_is_repeated_until_a_round_is_long_enough():
    clock = Clock()
    costs = {"fast": 0.0013, "slow": 0.2}
    candidates = {name: clock.candidate(name, cost) for name, cost in costs.items()}
    found = interleave(candidates, rounds=3, min_round_seconds=0.05, pause_seconds=0, clock=clock)
    assert found["slow"].calls == 1
    assert 0.05 <= found["fast"].calls * costs["fast"] < 0.5
    for name, cost in costs.items():
        assert found[name].median == pytest.approx(cost)


def test_a_candidate_that_cannot_be_built_is_absent_with_its_reason():
    def absent():
        raise benchmark.Unavailable("no compiler")

    clock, seen = Clock(), []
    candidates = {"absent": absent, "a": clock.candidate("a", 1.0)}
    found = interleave(
        candidates,
        rounds=2,
        min_round_seconds=1,
        pause_seconds=0,
        clock=clock,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert list(found) == ["a"]
    assert found.absent == {"absent": "no compiler"}
    assert seen[-1] == (6, 6)


def test_an_error_of_a_candidate_is_raised_and_leaves_the_collector_on():
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"broken": broken}, rounds=1, pause_seconds=0)
    assert gc.isenabled()


def test_candidates_run_under_inference_mode():
    seen = []
    interleave(
        {"a": lambda: seen.append(torch.is_inference_mode_enabled())},
        rounds=1,
        min_round_seconds=0,
        pause_seconds=0,
    )
    assert set(seen) == {True}


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        interleave({}, rounds=0)


def _timings(**medians):
    return {name.replace("_", " "): Timing(m, m, m, 1, 1, (m,)) for name, m in medians.items()}


def test_ratio_is_to_the_fastest_baseline_of_the_same_dtype():
    timings = _timings(
        eager=6.0, compile=3.0, fused_channels_last=0.5, fused=2.0, eager_bf16=1.0, fused_bf16=0.25
    )
    assert ratio_to_best(timings) == (1.5, "compile")
    assert ratio_to_best(timings, "fused bf16") == (4.0, "eager bf16")


def test_ratio_without_a_baseline_or_without_the_candidate_is_refused():
    with pytest.raises(ValueError, match="expected 'fused' and a baseline, got fused"):
        ratio_to_best(_timings(fused=1.0))
    with pytest.raises(ValueError, match="expected 'fused' and a baseline, got eager"):
        ratio_to_best(_timings(eager=1.0))


FAST = ("eager", "eager channels_last", "fused", "fused channels_last")


@pytest.fixture
def mixer():
    return AdditiveTokenMixer(5)


@pytest.fixture
def x():
    return torch.randn(2, 5, 6, 4)


def test_candidates_compute_the_mixer_in_eval_mode_and_their_layout(mixer, x):
    calls = mixer_candidates(mixer, x, include=FAST, backend="reference")
    expected = AdditiveTokenMixer(5).eval()
    expected.load_state_dict(mixer.state_dict())
    with torch.inference_mode():
        for name, call in calls.items():
            torch.testing.assert_close(call(), expected(x))
            layout = torch.channels_last if "channels_last" in name else torch.contiguous_format
            assert call().is_contiguous(memory_format=layout), name


def test_candidates_leave_the_mixer_as_it_was(mixer, x):
    before = {name: t.clone() for name, t in mixer.state_dict().items()}
    with torch.inference_mode():
        for call in mixer_candidates(mixer, x, include=FAST, backend="reference").values():
            call()
    assert mixer.training
    assert mixer.dwc.weight.is_contiguous()
    for name, t in mixer.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_bf16_candidates_run_under_autocast(mixer, x):
    include = ["eager bf16", "fused bf16"]
    with torch.inference_mode():
        for call in mixer_candidates(mixer, x, include=include, backend="reference").values():
            assert call().dtype is torch.bfloat16


def test_onnxruntime_computes_the_same(mixer, x):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.inference_mode():
        got = mixer_candidates(mixer, x, include=["onnxruntime"])["onnxruntime"]()
        expected = mixer.eval()(x)
    torch.testing.assert_close(torch.from_numpy(got), expected)


def test_onnxruntime_not_installed_is_said_with_the_remedy(mixer, x, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    call = mixer_candidates(mixer, x, include=["onnxruntime"])["onnxruntime"]
    with pytest.raises(benchmark.Unavailable, match=r"onnxruntime.*casvit-kernels\[export\]"):
        call()


def test_a_failing_compiler_is_said_with_its_reason(mixer, x, monkeypatch):
    def compile(module, **options):
        def fail(x):
            raise OSError("g++: not found\nand much more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    calls = mixer_candidates(mixer, x, include=["eager", "compile"])
    found = interleave(calls, rounds=1, min_round_seconds=0, pause_seconds=0)
    assert found.absent == {"compile": "torch.compile failed: OSError: g++: not found"}
    assert list(found) == ["eager"]


def test_a_backend_that_cannot_serve_is_an_error_and_not_absent(mixer, x):
    calls = mixer_candidates(mixer, x, include=["fused"], backend="triton")
    with pytest.raises(BackendUnavailable, match="triton"):
        interleave(calls, rounds=1)


def test_wrong_arguments_are_named(mixer, x):
    with pytest.raises(
        ValueError, match=r"include: expected names out of eager, .*, got 'fastest'"
    ):
        mixer_candidates(mixer, x, include=["fastest"])
    with pytest.raises(ValueError, match=r"include: .*, got 'onnxruntime bf16'"):
        mixer_candidates(mixer, x, include=["onnxruntime bf16"])
    with pytest.raises(ValueError, match=r"x: expected a float32 tensor, got torch.float64"):
        mixer_candidates(mixer, x.double())
    with pytest.raises(ValueError, match=r"x: expected the device of the mixer, got meta"):
        mixer_candidates(mixer, x.to("meta"))
    with pytest.raises(ValueError, match="mixer: expected a plain one"):
        mixer_candidates(FusedCATM(5), x)


def test_a_model_without_mixers_is_refused():
    call = benchmark.model_candidates(torch.nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))["fused"]
    with pytest.raises(ValueError, match="model: expected mixers that can all be fused"):
        call()


def test_environment_names_what_a_number_depends_on():
    found = benchmark.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["date"][:2] == "20"


def test_a_stopwatch_measures_instead_of_the_clock():
    calls = []

    def stopwatch(call, count):
        for _ in range(count):
            call()
        return 0.25 * count

    found = interleave(
        {"a": lambda: calls.append(1)},
        rounds=3,
        min_round_seconds=0.5,
        pause_seconds=0,
        stopwatch=stopwatch,
    )
    assert found["a"].median == 0.25
    assert found["a"].calls >= 2
    assert len(calls) > 3 * found["a"].calls


def test_the_mix_alone_gives_the_output_of_the_mixer(mixer, x):
    require_native()
    include = ["fused", "fused mix", "fused mix channels_last", "fused mix bf16", "fused bf16"]
    calls = mixer_candidates(mixer, x, include=include, backend="cpu")
    with torch.inference_mode():
        torch.testing.assert_close(calls["fused mix"](), calls["fused"]())
        torch.testing.assert_close(calls["fused mix channels_last"](), calls["fused"]())
        got, expected = calls["fused mix bf16"](), calls["fused bf16"]()
    torch.testing.assert_close(got, expected, atol=0.01, rtol=0.02)
    calls = mixer_candidates(mixer, x, include=["fused mix"], backend="reference")
    with pytest.raises(benchmark.Unavailable, match="no mixing apart from the product"):
        calls["fused mix"]()


def test_a_models_step_gives_the_gradients_of_its_parameters():
    require_native()
    model = rcvit_xs(num_classes=3, distillation=False)
    x = torch.randn(2, 3, 32, 32)
    include = ["eager", "fused channels_last"]
    calls = benchmark.model_training_candidates(model, x, include=include, backend="cpu")
    eager, fused = (call() for call in calls.values())
    assert len(eager) == len(fused) == 1 + len(list(model.parameters()))
    torch.testing.assert_close(fused[0], eager[0], atol=1e-3, rtol=1e-3)
