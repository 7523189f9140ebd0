"""The process of one candidate: builds it, computes all images once, then times a turn when told to.

    python -m casvit_kernels.benchmark.worker FOLDER NAME THREADS [BACKEND]

Speaks JSON, a line each way, see `processes.py`; ends with its stdin.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from ..module import UnfusedWarning
from .network import candidate
from .processes import IMAGES, MODEL, ONE_LINE, ONNX, output_of
from .timer import Unavailable, WallStopwatch, enough_calls


def main(arguments: list[str]) -> None:
    folder, name, threads, *backend = arguments
    warnings.simplefilter("error", UnfusedWarning)  # it would be timed as what it is not
    with _private_stdout() as answers:

        def answer(found: dict[str, Any]) -> None:
            print(json.dumps(found), file=answers, flush=True)

        try:
            torch.set_num_threads(int(threads))
            call, facts = _built(Path(folder), name, backend[0] if backend else None)
        except Unavailable as error:
            answer({"absent": _line(error)})
            return
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {_line(error)}"})
            return
        answer({"facts": facts})
        with torch.inference_mode():
            _take_turns(call, answer)


def _built(
    folder: Path, name: str, backend: str | None
) -> tuple[Callable[[], object], dict[str, str]]:
    """What to time; its outputs of all images are then in the folder."""
    model = torch.load(folder / MODEL, weights_only=False)  # written by our own parent
    given = torch.load(folder / IMAGES)
    images, batch = given["x"], given["batch"]
    onnx = folder / ONNX
    parts = images.split(batch)
    with torch.inference_mode():
        made = candidate(name, model, parts[0], onnx if onnx.is_file() else None, backend)
        found = [torch.as_tensor(made.run(made.prepare(part))).float().clone() for part in parts]
        torch.save(torch.cat(found), folder / output_of(name))
        x = made.prepare(parts[0])
    run = made.run
    return lambda: run(x), made.facts


def _take_turns(call: Callable[[], object], answer: Callable[[dict[str, Any]], None]) -> None:
    """A turn for each line of stdin, which says how many seconds it shall last."""
    watch, calls = WallStopwatch(), 0
    for line in sys.stdin:
        least = float(line)
        if calls == 0:
            calls = enough_calls(lambda count: watch(call, count), least)
        # Wakes threads, and brings back the caches that others used meanwhile.
        watch(call, max(1, calls // 5))
        answer({"seconds": watch(call, calls) / calls, "calls": calls})


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:ONE_LINE] or type(error).__name__


def _private_stdout() -> TextIO:
    """Stdout for answers alone: what libraries print to it goes to stderr."""
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "w", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # compilers' threads would first finish what they have queued
