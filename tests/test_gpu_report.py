"""From the JSON of bench/gpu to tables and goals; and what is not reported."""

import json

import gpu_script
import pytest
from conftest import require_native
from gpu_script import schedule

from bench.report import command as report
from bench.report.gate import gated, refusal
from bench.report.goals import GPU_MODELS, goal_lines

STAGE_1 = "cpu-bfloat16-channels_last-eval-2x48x56x56-0-cuda"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a trial writes, on tiny work."""
    require_native()
    out = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        gpu_script.inside(patch)
        gpu_script.tiny(patch)
        gpu_script.judge(out)
        assert gpu_script.run(out) == 0
    return out


@pytest.fixture
def checkout(tmp_path, results):
    """A tree with a README, and a trial's files as if an H100 had written them."""
    (tmp_path / "README.md").write_text(f"# Title\n{report.BEGIN}\nold\n{report.END}\n")
    folder = tmp_path / "bench" / "results" / "nvidia-h100"
    folder.mkdir(parents=True)
    for part in schedule.PARTS:
        document = gpu_script.read(results, part)
        document["environment"] |= {
            "device": "cuda",
            "gpu": "NVIDIA H100",
            "cuda": "13.0",
            "triton": "3.6.0",
        }
        document["stamp"]["quick"] = False
        (folder / f"{part}.json").write_text(json.dumps(document))
    return tmp_path


def _edit(checkout, part, change):
    path = checkout / "bench" / "results" / "nvidia-h100" / f"{part}.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_the_report_takes_what_the_script_writes(checkout):
    _edit(checkout, "parity", lambda d: d["cases"].append({"id": STAGE_1, "passed": True}))
    fast = {"fused channels_last": 205.6, "eager": 2000.0, "eager channels_last": 1028.0}
    _edit(checkout, "mixer", lambda d: d["cases"].append(gpu_script.goal_case("mixer", 1, fast)))
    assert report.main(["--root", str(checkout)]) == 0
    complete = (checkout / "bench" / "results" / "README.md").read_text()
    assert "## nvidia-h100" in complete
    assert "- parity: 29 of 29 passed" in complete
    assert "- sanitizer: 0 of 2 passed" in complete
    assert "xs stage 1, (256, 48, 56, 56)" in complete
    assert "0.206 (0.206 to 0.206), 3 MiB, share 0.50" in complete  # floor: 102.8 us
    for part in schedule.SPEED:
        assert f"### {part}" in complete
    text = (checkout / "docs" / "performance.md").read_text()
    assert "## NVIDIA H100\n\nNVIDIA H100 (CUDA or HIP 13.0)" in text
    assert "forward over eager channels_last (goal 5): met where measured, 5.00 at worst" in text
    assert (
        "share of the floor over the 0.5 that is possible (goal 0.6): met where measured, 1.00"
        in text
    )
    assert "Any GPU" not in text
    assert report.main(["--root", str(checkout), "--check"]) == 0


def test_a_case_too_large_for_the_gpu_is_not_red(checkout):
    too_large = {"absent": "it needs more memory than this GPU has", "passed": None}
    _edit(checkout, "parity", lambda d: d["cases"][0].update(too_large))
    assert report.main(["--root", str(checkout)]) == 0
    complete = (checkout / "bench" / "results" / "README.md").read_text()
    assert "- parity: 27 of 28 passed, 1 not run" in complete


def test_goals_are_judged_by_the_worst_mixer_of_stages_one_and_two():
    def figures(fused):
        return {
            "eager channels_last": 600.0,
            "max-autotune channels_last": 300.0,
            "fused channels_last": fused,
        }

    cases = [
        gpu_script.goal_case("training", stage, figures(100.0), model)
        for model in GPU_MODELS
        for stage in (1, 2)
    ]
    lines = goal_lines([{"cases": cases}])
    assert (
        "step over eager channels_last (goal 3): met, 6.00 at worst (xs stage 1; 8 of 8"
        in _line(lines, "step over eager")
    )
    cases[5] = gpu_script.goal_case("training", 2, figures(200.0), "m")
    lines = goal_lines([{"cases": cases}])
    assert "step over max-autotune (goal 1.7): missed, 1.50 at worst (m stage 2" in _line(
        lines, "step over max"
    )
    assert _line(lines, "times less") == "times less kept for the backward (goal 4): not measured"
    other = gpu_script.goal_case("training", 1, figures(1.0)) | {"batch": 64}
    assert "not measured" in _line(goal_lines([{"cases": [other]}]), "step over eager")
    kept = {"eager channels_last": 900, "fused channels_last": 300}
    case = gpu_script.goal_case("training", 1, figures(1.0), **kept)
    assert "missed, 3.00 at worst" in _line(goal_lines([{"cases": [case]}]), "times less")


def _line(lines, start):
    (found,) = [line for line in lines if line.startswith(start)]
    return found


def test_the_floor_of_the_mixer_with_its_product_is_half_reached_at_best():
    times = {"fused channels_last": 2 * 102.8, "fused mix channels_last": 1.5 * 102.8}
    lines = goal_lines([{"cases": [gpu_script.goal_case("mixer", 1, times)]}])
    assert "met where measured, 1.00 at worst" in _line(lines, "forward, share of the floor over")
    assert "met where measured, 0.67 at worst" in _line(lines, "forward after the qkv product")


def test_one_image_is_judged_by_the_longer_of_gpu_and_cpu_time():
    gpu = {"eager": 50.0, "eager channels_last": 60.0, "fused channels_last": 20.0}
    cpu = {"eager": 90.0, "eager channels_last": 80.0, "fused channels_last": 160.0}
    case = gpu_script.goal_case("mixer", 2, gpu, batch=1, calls_us=cpu)
    line = _line(goal_lines([{"cases": [case]}]), "forward at batch 1")
    assert "missed, 0.50 at worst (xs stage 2; 1 of 4 measured)" in line


def _verdicts(**passed):
    return [{"id": f"triton-bfloat16-{key}-0-cuda", "passed": p} for key, p in passed.items()]


@pytest.mark.parametrize(
    ("verdicts", "reason"),
    [
        ({"x-eval-256x48x56x56": True}, None),
        ({"x-eval-2x48x56x56": True}, None),
        ({"x-eval-2x48x56x56": False, "x-eval-256x48x56x56": True}, None),  # its own shape counts
        ({"x-eval-2x48x56x56": True, "x-eval-256x48x56x56": False}, "parity is red"),
        ({"x-eval-256x48x56x56": True, "y-eval-256x48x56x56": False}, "parity is red"),
        ({"x-eval-2x48x56x56": True, "x-eval-2x56x28x28": False}, None),
        ({"x-train-2x48x56x56": True}, "no parity case of triton-bfloat16-eval-256x48x56x56"),
        ({"x-eval-256x48x56x56": None}, "parity is red"),
        ({}, "no parity case"),
    ],
)
def test_which_verdicts_a_case_needs(verdicts, reason):
    case = gpu_script.goal_case("mixer", 1, {"eager": 1.0})
    found = refusal(case, "triton", _verdicts(**verdicts))
    assert found is None if reason is None else reason in found
    document = {"stamp": {"backend": "triton"}, "cases": [case]}
    (kept,) = gated(document, {"cases": _verdicts(**verdicts)})["cases"]
    assert ("rows" in kept) == (reason is None)


def test_a_model_needs_the_verdicts_of_all_its_mixers():
    case = gpu_script.goal_case("model", 1, {}) | {"stage": None}
    assert "which mixers" in refusal(case, "triton", [])
    case["mixer_shapes"] = [[256, 48, 56, 56], [256, 56, 28, 28]]
    one = {"x-eval-2x48x56x56": True}
    assert "256x56x28x28" in refusal(case, "triton", _verdicts(**one))
    assert refusal(case, "triton", _verdicts(**one, **{"x-eval-2x56x28x28": True})) is None
    red = refusal(case, "triton", _verdicts(**one, **{"x-eval-2x56x28x28": False}))
    assert "parity is red, triton-bfloat16-x-eval-2x56x28x28" in red


def test_a_mixer_whose_own_parity_is_red_has_a_reason_instead_of_numbers(checkout):
    _edit(checkout, "parity", lambda d: d["cases"].append({"id": STAGE_1, "passed": False}))
    fast = {"fused channels_last": 205.6, "eager": 2000.0, "eager channels_last": 1028.0}
    _edit(checkout, "mixer", lambda d: d["cases"].append(gpu_script.goal_case("mixer", 1, fast)))
    assert report.main(["--root", str(checkout)]) == 0
    complete = (checkout / "bench" / "results" / "README.md").read_text()
    assert f"no speed: parity is red, {STAGE_1}" in complete
    assert "0.206" not in complete
    assert "over eager channels_last (goal 5): not measured" in complete
    assert "| xs stage 4, (1, 220, 7, 7) |" in complete  # the others stay


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("parity", lambda d: d["stamp"].update(version="other"), "no speed without parity"),
        ("mixer", lambda d: d["stamp"].update(version="older"), "no speed without parity"),
        ("mixer", lambda d: d["stamp"].update(quick=True), "a trial of the machinery"),
        ("mixer", lambda d: d["environment"].update(device="cpu"), "a trial of the machinery"),
        ("mixer", lambda d: d.pop("cases"), "expected a file of bench/gpu"),
    ],
    ids=["other parity", "older sources", "quick", "cpu", "broken"],
)
def test_the_report_refuses(checkout, part, change, message, capsys):
    _edit(checkout, part, change)
    assert report.main(["--root", str(checkout)]) == 2
    assert message in capsys.readouterr().err


def test_counters_have_a_table_of_their_own(checkout):
    kernels = [{"name": "gates", "duration_s": 90e-6, "dram_bytes": 151e6, "launches": 3}]
    case = gpu_script.goal_case("mixer", 1, {}) | {"kernels": kernels}
    del case["rows"]
    _edit(checkout, "counters", lambda d: d["cases"].append(case))
    _edit(checkout, "parity", lambda d: d["cases"].append({"id": STAGE_1, "passed": True}))
    assert report.main(["--root", str(checkout)]) == 0
    complete = (checkout / "bench" / "results" / "README.md").read_text()
    row = "| xs stage 1, (256, 48, 56, 56) | gates | 90 | 151 | not measured | not measured |"
    assert row in complete
    assert "39 us more than loading its bytes takes, over 25 us" in complete
