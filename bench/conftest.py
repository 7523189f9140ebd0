"""Options, one test for each case and candidate, and the JSON at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measure import REPLAY, Case, Measured, Settings, write

from casvit_kernels import backends
from casvit_kernels.timing import BF16

MODELS = ("xs", "s", "m", "t")


SETTINGS = pytest.StashKey[Settings]()
MEASURED = pytest.StashKey[dict[Case, Measured]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("casvit_kernels benchmarks")
    group.addoption("--models", help="comma-separated, of xs,s,m,t (default: xs,t; quick: xs)")
    group.addoption("--batches", help="comma-separated batch sizes (default: 1,8; quick: 1)")
    group.addoption("--quick", action="store_true", help="try the machinery on the smallest cases")
    group.addoption("--backend", default="cpu", help="of the fused candidates (default: cpu)")
    group.addoption("--json-dir", type=Path, help="where to write results, e.g. bench/results")


def pytest_configure(config: pytest.Config) -> None:
    quick = config.getoption("--quick")
    rounds, seconds = (3, 0.005) if quick else (15, 0.05)
    config.stash[SETTINGS] = Settings(rounds, seconds, config.getoption("--backend"), quick)
    config.stash[MEASURED] = {}
    unknown = set(models(config)) - set(MODELS)
    if unknown:
        raise pytest.UsageError(
            f"--models: expected names out of {','.join(MODELS)}, got {','.join(sorted(unknown))}"
        )
    known = [s.name for s in backends()]
    if config.getoption("--backend") not in known:
        raise pytest.UsageError(
            f"--backend: expected one of {','.join(known)}, got {config.getoption('--backend')}"
        )
    given = config.getoption("--batches")
    if given and not all(b.isdecimal() and int(b) > 0 for b in given.split(",")):
        raise pytest.UsageError(f"--batches: expected positive integers, got {given}")


def models(config: pytest.Config) -> list[str]:
    given = config.getoption("--models") or ("xs" if config.getoption("--quick") else "xs,t")
    return [str(name) for name in given.split(",")]


def batches(config: pytest.Config) -> list[int]:
    given = config.getoption("--batches") or ("1" if config.getoption("--quick") else "1,8")
    return [int(b) for b in given.split(",")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case and candidate, out of the test file's `cases` and `candidates`."""
    if not {"case", "candidate"} <= set(metafunc.fixturenames):
        return
    config = metafunc.config
    cases = metafunc.module.cases(models(config), batches(config), config.getoption("--quick"))
    metafunc.parametrize(
        ("case", "candidate"),
        [
            pytest.param(case, name, id=f"{case.id}-{name.replace(' ', '_')}")
            for case in cases
            for name in names(metafunc.module.NAMES, case)
        ],
    )


def names(known: tuple[str, ...], case: Case) -> list[str]:
    if case.dtype == "bfloat16":
        return [name + BF16 for name in known if name != "onnxruntime"]
    return list(known)


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
            if candidate.startswith("fused") and "compile" not in measured.absent:
                pytest.fail(f"{candidate} cannot be built: {reason}", pytrace=False)
            pytest.skip(reason)
        timing = measured.timings[candidate]
        benchmark.group = f"{case.level} {case.id}"
        benchmark.extra_info |= {
            "median_s": timing.median,
            "p25_s": timing.p25,
            "p75_s": timing.p75,
            "calls_per_round": timing.calls,
            "max_error": measured.errors[candidate],
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
            done[case] = request.module.run(case, names(request.module.NAMES, case), settings)
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
