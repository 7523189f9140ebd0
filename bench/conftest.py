"""Options, one test for each case and candidate, and the JSON at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.case import GPU_CHOICE, Case, Choice, Settings, names, settings_for
from bench.harness.replay import REPLAY
from bench.harness.results import Measured, write
from casvit_kernels import backends

MODELS = ("xs", "s", "m", "t")


SETTINGS = pytest.StashKey[Settings]()
MEASURED = pytest.StashKey[dict[Case, Measured]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("casvit_kernels benchmarks")
    group.addoption("--device", default="cpu", help="cpu (the default) or cuda")
    group.addoption(
        "--models",
        help="comma-separated, of xs,s,m,t (default: xs,t; whole networks and on a GPU all; quick: xs)",
    )
    group.addoption(
        "--batches", help="comma-separated batch sizes (default: 1,8; on a GPU 1,64,256; quick: 1)"
    )
    group.addoption(
        "--inputs", help="comma-separated image sizes (default: 224; on a GPU 224,384; quick: 224)"
    )
    group.addoption(
        "--starts",
        type=int,
        choices=(1, 2, 3),
        help="of whole networks: how often the processes are started anew (default: 3)",
    )
    group.addoption("--quick", action="store_true", help="try the machinery on the smallest cases")
    group.addoption("--backend", help="of the fused candidates (default: cpu; on a GPU triton)")
    group.addoption("--json-dir", type=Path, help="where to write results, e.g. bench/results")


def pytest_configure(config: pytest.Config) -> None:
    device, quick = config.getoption("--device"), config.getoption("--quick")
    backend = config.getoption("--backend") or ("cpu" if device == "cpu" else "triton")
    settings = settings_for(device, backend, quick)
    if starts := config.getoption("--starts"):
        settings = dataclasses.replace(settings, starts=starts)
    config.stash[SETTINGS] = settings
    config.stash[MEASURED] = {}
    if device not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device: expected cpu or cuda, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU")
    given = config.getoption("--models")
    unknown = set(given.split(",") if given else ()) - set(MODELS)
    if unknown:
        raise pytest.UsageError(
            f"--models: expected names out of {','.join(MODELS)}, got {','.join(sorted(unknown))}"
        )
    known = [s.name for s in backends()]
    if backend not in known:
        raise pytest.UsageError(f"--backend: expected one of {','.join(known)}, got {backend}")
    for option in ("--batches", "--inputs"):
        given = config.getoption(option)
        if given and not all(b.isdecimal() and int(b) > 0 for b in given.split(",")):
            raise pytest.UsageError(f"{option}: expected positive integers, got {given}")


def choice(config: pytest.Config) -> Choice:
    device, quick = config.getoption("--device"), config.getoption("--quick")
    found = Choice() if device == "cpu" else GPU_CHOICE
    if quick:
        found = Choice(("xs",), (1,), (224,), device != "cpu", True, ("xs",))
    if given := config.getoption("--models"):
        models = tuple(given.split(","))
        found = found._replace(models=models, networks=models)
    if given := config.getoption("--batches"):
        found = found._replace(batches=tuple(map(int, given.split(","))))
    if given := config.getoption("--inputs"):
        found = found._replace(inputs=tuple(map(int, given.split(","))))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case and candidate, out of the test file's `cases` and `candidates`."""
    if not {"case", "candidate"} <= set(metafunc.fixturenames):
        return
    config = metafunc.config
    chosen = choice(config)
    metafunc.parametrize(
        ("case", "candidate"),
        [
            pytest.param(case, name, id=f"{case.id}-{name.replace(' ', '_')}")
            for case in metafunc.module.cases(chosen)
            for name in names(metafunc.module, case, chosen.gpu)
        ],
    )


@pytest.fixture
def show(
    benchmark: Any, request: pytest.FixtureRequest, case: Case, candidate: str
) -> Callable[[], None]:
    """Hands one candidate's rounds to pytest-benchmark, or fails or skips with the reason."""

    def show() -> None:
        measured = _measured(request, case)
        if measured.refused is not None:
            pytest.fail(measured.refused, pytrace=False)
        if candidate in measured.absent:
            reason = measured.absent[candidate]
            # What this library offers must not go missing where the plain counterpart is there.
            compiles = {"compile", "compile channels_last"} & measured.absent.keys()
            if candidate.startswith("fused") and not compiles:
                pytest.fail(f"{candidate} cannot be built: {reason}", pytrace=False)
            pytest.skip(reason)
        if candidate in measured.failed:
            pytest.fail(measured.failed[candidate], pytrace=False)
        timing = measured.timings[candidate]
        benchmark.group = f"{case.level} {case.id}"
        benchmark.extra_info |= {
            "median_s": timing.median,
            "p25_s": timing.p25,
            "p75_s": timing.p75,
            "calls_per_round": timing.calls,
            "max_error": measured.errors.get(candidate),
        }
        REPLAY.load(timing.samples)
        benchmark.pedantic(REPLAY.step, rounds=timing.rounds)

    return show


def _measured(request: pytest.FixtureRequest, case: Case) -> Measured:
    """The case's measurement, made when its first candidate asks for it."""
    done = request.config.stash[MEASURED]
    if case not in done:
        settings = request.config.stash[SETTINGS]
        status = {s.name: s for s in backends()}[settings.backend]
        if not status.usable:
            pytest.fail(f"backend {status.name!r} is not usable: {status.reason}", pytrace=False)
        try:
            wanted = names(request.module, case, settings.device != "cpu")
            done[case] = request.module.run(case, wanted, settings)
        except Exception as error:
            done[case] = Measured(case, refused=f"{type(error).__name__}: {error}")
            raise
    return done[case]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Results of a run that came to its end; one that was interrupted writes nothing."""
    config = session.config
    folder = config.getoption("--json-dir")
    done = list(config.stash[MEASURED].values())
    if folder is None or not done:
        return
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    for path in write(folder, done, config.stash[SETTINGS]):
        print(f"\nwrote {path}")
