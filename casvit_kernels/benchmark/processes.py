"""Times the candidates of a whole network, each in a process of its own, in turn.

The processes live as long as their turns last, so that nothing is compiled twice; all but one of them
wait for a line and do nothing. Between two turns nobody works, until the threads that spin after a call
have gone to sleep.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor, nn

from .timer import Timings, summary

MODEL, IMAGES, ONNX = "model.pt", "images.pt", "model.onnx"  # in the folder of a race
ONE_LINE = 300  # characters of a reason


def output_of(name: str) -> str:
    """The file of a candidate's outputs, in that folder."""
    return f"{name.replace(' ', '_')}.out.pt"


@dataclass
class Race:
    """What came of the candidates, by name."""

    timings: Timings = field(default_factory=Timings)  #: `absent` has what could not be built
    outputs: dict[str, Tensor] = field(default_factory=dict)  #: of all images, float32
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  #: what raised or crashed
    refused: str | None = None  #: then nothing was timed


def race(
    model: nn.Module,
    x: Tensor,
    names: Iterable[str],
    *,
    batch: int,
    onnx: Path | None = None,
    backend: str | None = None,
    threads: int | None = None,
    rounds: int = 15,
    starts: int = 3,
    min_round_seconds: float = 0.05,
    pause_seconds: float = 0.05,
    gate: Callable[[dict[str, Tensor]], str | None] | None = None,
    between: Callable[[], object] | None = None,
    progress: Callable[[str], object] | None = None,
) -> Race:
    """Build every candidate, compute all images with it, then time it.

    Args:
        model: plain, in eval mode; of classes that another process can import.
        x: ``(N, 3, H, W)`` float32, N a multiple of `batch`: what `outputs` are of. The first `batch`
            images are what is timed.
        names: see `names_for`. Eager and fused ones are built first.
        onnx: the model's file for `batch` images, for those that read one.
        backend: of the fused mixers.
        threads: of each candidate; None: as many as PyTorch has here.
        rounds: of turns altogether, of every candidate; in rotated order.
        starts: how often the processes are started anew in that time, since memory lies elsewhere then.
        min_round_seconds: calls are repeated within a turn until they last that long.
        pause_seconds: before each turn; threads spin for up to 35 ms.
        gate: told the outputs of eager and fused candidates before anything else is built; a reason
            ends the race.
        between: called after each round, when no candidate works.
        progress: told what is done.

    Raises:
        ValueError: an argument does not fit.
    """
    for name, value in (("rounds", rounds), ("starts", starts), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if x.dim() != 4 or len(x) < 1 or len(x) % batch:
        raise ValueError(
            f"x: expected (N, 3, H, W) with N a multiple of {batch}, got {tuple(x.shape)}"
        )
    say = progress or (lambda what: None)
    ordered = sorted(dict.fromkeys(names), key=lambda name: not _ours(name))
    found = Race()
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ordered}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        torch.save(model, folder / MODEL)
        torch.save({"x": x, "batch": batch}, folder / IMAGES)
        if onnx is not None:
            (folder / ONNX).write_bytes(onnx.read_bytes())
        for start in range(min(starts, rounds)):
            with _Workers(folder, threads or torch.get_num_threads(), backend) as workers:
                _build(workers, ordered, found, say, gate if start == 0 else None)
                if found.refused is not None:
                    return found
                for turn in range(start, rounds, starts):  # the starts share the rounds out
                    say(f"round {turn + 1} of {rounds}")
                    present = list(workers)
                    first = turn % max(len(present), 1)
                    for name in present[first:] + present[:first]:
                        time.sleep(pause_seconds)
                        answer = workers.ask(name, repr(min_round_seconds))
                        if "failed" in answer:
                            found.failed[name] = answer["failed"]
                        else:
                            turns[name].append(answer)
                    if between is not None:
                        time.sleep(pause_seconds)
                        between()
    for name, answers in turns.items():
        if answers and name not in found.failed:
            seconds = [answer["seconds"] for answer in answers]
            found.timings[name] = summary(seconds, answers[-1]["calls"])
    return found


def _build(
    workers: _Workers,
    names: list[str],
    found: Race,
    say: Callable[[str], object],
    gate: Callable[[dict[str, Tensor]], str | None] | None,
) -> None:
    """Start a process for each candidate; `found.refused` where the gate ends it."""
    missing = found.timings.absent.keys() | found.failed.keys()  # at an earlier start
    ours = [name for name in names if _ours(name)]
    for index, name in enumerate(names):
        if gate is not None and index == len(ours):
            found.refused = gate(found.outputs)
            if found.refused is not None:
                return
        if name in missing:
            continue
        say(f"building {name}")
        answer = workers.begin(name)
        if "absent" in answer:
            found.timings.absent[name] = answer["absent"]
        elif "failed" in answer:
            found.failed[name] = answer["failed"]
        else:
            found.facts[name] = answer["facts"]
            found.outputs[name] = workers.output(name)
    if gate is not None and len(ours) == len(names):
        found.refused = gate(found.outputs)


def _ours(name: str) -> bool:
    return name.startswith(("eager", "fused"))


class _Workers(dict[str, "subprocess.Popen[str]"]):
    """Processes by candidate; all of them are gone when the block ends."""

    def __init__(self, folder: Path, threads: int, backend: str | None) -> None:
        super().__init__()
        self._folder, self._arguments = folder, [str(threads), *([backend] if backend else [])]
        root = str(Path(__file__).resolve().parents[2])  # of this very package
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(threads),
        }

    def __enter__(self) -> _Workers:
        gc.collect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in list(self):
            self._end(name)

    def begin(self, name: str) -> dict[str, Any]:
        """Start a candidate's process; its answer, once it is built. It stays if it can be timed."""
        with self._errors(name).open("wb") as errors:
            self[name] = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "casvit_kernels.benchmark.worker",
                    str(self._folder),
                    name,
                    *self._arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment,
            )
        answer = self._answer(name)
        if "facts" not in answer:
            self._end(name)
        return answer

    def ask(self, name: str, line: str) -> dict[str, Any]:
        """Its answer to a line; of a process that ended, ``failed`` with the reason."""
        # A pipe that is broken is read below, as the end of its answers.
        with contextlib.suppress(BrokenPipeError):
            print(line, file=_pipe(self[name].stdin), flush=True)
        answer = self._answer(name)
        if "failed" in answer:
            self._end(name)
        return answer

    def output(self, name: str) -> Tensor:
        """Of all images, by a candidate that was built."""
        out: Tensor = torch.load(self._folder / output_of(name))
        return out

    def _answer(self, name: str) -> dict[str, Any]:
        line = _pipe(self[name].stdout).readline()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self[name].wait()
        said = self._errors(name).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((text.strip() for text in reversed(said) if text.strip()), "")
        reason = f"its process ended with status {status}"
        return {"failed": (f"{reason}: {last}" if last else reason)[:ONE_LINE]}

    def _errors(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '_')}.stderr"

    def _end(self, name: str) -> None:
        process = self.pop(name)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                _pipe(pipe).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
