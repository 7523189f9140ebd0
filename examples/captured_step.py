"""A whole training step, and inference, as CUDA graphs; and by torch.compile(mode="reduce-overhead").

python examples/captured_step.py
python examples/captured_step.py --way plain --way graph --amp fp16 --steps 200 --json

A small CAS-ViT learns to tell noisy patterns apart, once in each way, from the same seed and on the
same batches. Graphs need a GPU: without one the same step is run as it is, and that is said. What must
hold of a step that is captured: docs/gpus.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from recipe.arguments import four, integer, number
from recipe.problem import Problem
from torch import Tensor

from casvit_kernels.demo.progress import phase
from casvit_kernels.models import Config, RCViT

Call = Callable[[], object]

WAYS = {
    "plain": "called",
    "graph": "captured by torch.cuda.CUDAGraph and replayed",
    "compile": "torch.compile(mode='reduce-overhead')",
}
WITHOUT_GPU = {
    "plain": WAYS["plain"],
    "graph": "no GPU: the step is run as it is, not captured",
    "compile": "torch.compile(mode='reduce-overhead'); no GPU: compiled, not captured",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3  # calls before a capture: libraries set themselves up, the optimizer makes its state
TEST_BATCHES = WARM_UP + 5


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 2 something for the user to put right."""
    options = parse(argv)
    try:
        device = device_of(options)
        graphs = device.type == "cuda"
        rows = [learn(options, device, way, graphs) for way in options.way or WAYS]
    except Problem as problem:
        print(f"captured_step: {problem}", file=sys.stderr)
        return 2
    for row in rows:
        row["loss_differs_by"] = max(
            abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True)
        )
    if options.json:
        settings = {**vars(options), "device": str(device), "torch": torch.__version__}
        print(json.dumps({"command": "captured_step", "options": settings, "ways": rows}))
    else:
        print("\n".join(text(row, rows[0]["way"]) for row in rows))
    return 0


class Training:
    """A model with its optimizer, and the tensors that its step reads and writes.

    `step` and `infer` keep to what a capture asks: no value goes to the CPU, no shape depends on one,
    and what changes from call to call is a tensor that is written in place.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device, compiled: bool) -> None:
        self._amp, self._device = options.amp, device
        torch.manual_seed(options.seed)
        config = Config(options.layers, options.dims)
        try:
            model = RCViT(config, options.classes, distillation=False, fused=True)
        except ValueError as error:
            raise Problem(f"the model: {error}") from error
        self.model = model.to(device)
        self._run: Any = self.model
        if compiled:
            self._run = torch.compile(self.model, mode="reduce-overhead", fullgraph=True)
        self.rate = torch.tensor(options.lr, device=device)  # a float would be captured as it is
        # fused: it takes from the scaler, as a tensor, whether to step; others ask on the CPU.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.rate, fused=True, capturable=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._amp == "fp16")
        count, size = options.batch_size, options.input_size
        self.images = torch.zeros(count, 3, size, size, device=device)
        self.labels = torch.zeros(count, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.logits = torch.zeros(count, options.classes, device=device)

    def step(self) -> None:
        """From `images` and `labels` to `loss` and new weights."""
        with self._autocast():
            loss = F.cross_entropy(self._run(self.images), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # To None: a capture then begins without gradients, and the graph has its own.
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(loss.detach())

    def infer(self) -> None:
        """From `images` to `logits`."""
        with torch.no_grad(), self._autocast():
            self.logits.copy_(self._run(self.images))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._amp == "none":
            return nullcontext()
        # Uncached: a weight cast before the capture would be, in every replay, what it was then.
        return torch.autocast(self._device.type, DTYPES[self._amp], cache_enabled=False)


class Captured:
    """A call that is made `WARM_UP` times, then captured, and from then on replayed.

    Each time the work is done once: the warm-up is the first steps of the training.
    """

    def __init__(self, call: Call) -> None:
        self._call, self._warm_up = call, WARM_UP
        self._replay: Call | None = None

    def __call__(self) -> None:
        if self._warm_up:
            self._warm_up -= 1
            with side_stream():
                self._call()
            return
        if self._replay is None:
            self._replay = capture(self._call)  # computes nothing yet
        self._replay()


def capture(call: Call) -> Call:
    """The call as a CUDA graph: what is returned replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Call = graph.replay
    return replay


@contextmanager
def side_stream() -> Iterator[None]:
    """Another stream than the current one, as a warm-up needs; each waits for the other."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def learn(
    options: argparse.Namespace, device: torch.device, way: str, graphs: bool
) -> dict[str, Any]:
    """Train and test in one way; its row of the results. graphs: whether there can be any."""
    training = Training(options, device, compiled=way == "compile")
    step: Call = training.step
    infer: Call = training.infer
    if way == "graph" and graphs:
        step, infer = Captured(step), Captured(infer)
    # The compiler's graphs reuse their memory from step to step.
    mark: Call = torch.compiler.cudagraph_mark_step_begin if way == "compile" else bool
    losses, hits = [], []
    with phase(way, options.steps + TEST_BATCHES) as bar:
        training.model.train()
        for index, (images, labels) in enumerate(batches(options, options.steps, 1)):
            if index == WARM_UP + 1:  # warmed up, captured and compiled
                start = now(device)
            training.images.copy_(images, non_blocking=True)
            training.labels.copy_(labels, non_blocking=True)
            training.rate.fill_(options.lr * (1 - index / options.steps))
            mark()
            step()
            losses.append(training.loss.clone())  # still on the device: nobody waits for it
            bar.advance()
        seconds = now(device) - start

        training.model.eval()
        for images, labels in batches(options, TEST_BATCHES, 2):
            training.images.copy_(images, non_blocking=True)
            mark()
            infer()
            hits.append((training.logits.argmax(1) == labels.to(device)).float().mean())
            bar.advance()
    values = torch.stack(losses).tolist()
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise Problem(
                f"{way}, step {index}: expected a finite loss, got {value}; try a smaller --lr"
            )
    return {
        "way": way,
        "how": (WAYS if graphs else WITHOUT_GPU)[way],
        "losses": values,
        "top1": 100 * torch.stack(hits).mean().item(),
        "milliseconds_per_step": 1e3 * seconds / (options.steps - WARM_UP - 1),
    }


def batches(options: argparse.Namespace, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, 3, H, W) float32 and (B,) int64, on the CPU: a pattern for each class, in twice as much noise.

    seed: of these batches; the patterns are the same for all.
    """
    patterns = torch.Generator().manual_seed(options.seed)
    size = options.input_size
    pattern = torch.randn(options.classes, 3, size, size, generator=patterns)
    drawn = torch.Generator().manual_seed(options.seed + seed)
    for _ in range(count):
        labels = torch.randint(options.classes, (options.batch_size,), generator=drawn)
        noise = torch.randn(options.batch_size, 3, size, size, generator=drawn)
        yield 0.5 * pattern[labels] + noise, labels


def text(row: dict[str, Any], first: str) -> str:
    """A way's lines for people."""
    losses = row["losses"]
    lines = [
        f"{row['way']}: {row['how']}",
        f"    loss {losses[0]:.3f} to {losses[-1]:.3f}, top-1 {row['top1']:.1f} %, "
        f"{row['milliseconds_per_step']:.2f} ms a step",
    ]
    if row["way"] != first:
        lines.append(
            f"    losses differ from those of {first} by up to {row['loss_differs_by']:.2g}"
        )
    return "\n".join(lines)


def now(device: torch.device) -> float:
    """Seconds, when the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_of(options: argparse.Namespace) -> torch.device:
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise Problem(
            "--device: expected one that is there, got cuda, and torch.cuda.is_available() is False"
        )
    return torch.device("cuda" if there and options.device != "cpu" else "cpu")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--way", choices=list(WAYS), action="append", help="may be repeated; by default all")
    add("--amp", choices=("none", "bf16", "fp16"), default="bf16", help="fp16: with a GradScaler")
    add("--layers", type=four, default=(1, 1, 1, 1), metavar="N,N,N,N", help="blocks per stage")
    add("--dims", type=four, default=(16, 24, 32, 48), metavar="N,N,N,N", help="channels per stage")
    add("--input-size", type=integer(32), default=64, help="pixels of the side")
    add("--batch-size", type=integer(2), default=32)
    add("--classes", type=integer(2), default=10)
    add("--steps", type=integer(WARM_UP + 2), default=60)
    add("--lr", type=number(0), default=2e-3, help="at the first step; it falls linearly to 0")
    add("--seed", type=integer(0), default=0)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--json", action="store_true", help="print the results as one JSON document")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
