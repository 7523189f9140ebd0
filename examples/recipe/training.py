"""A run of a dense task, counted in steps: its state, its checkpoints, its loop."""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casvit_kernels._optional import MissingExtra, need
from casvit_kernels.models import CheckpointError, RCViT, load_checkpoint
from casvit_kernels.models.heads import load_dense_checkpoint

from . import checkpoint, data, pictures, stream
from .logs import Logs
from .machine import autocast, make_directory, plain, say, settle_machine, settle_output
from .problem import Problem, Stopped
from .processes import Processes, StopRequest, joined

LAST, BEST = "last.pt", "best.pt"
BATCH_OF_RATE = 32  # the total batch that --lr is meant for
COLUMNS = ("step", "images", "loss", "lr", "images_per_second")
# Settings that may change when a run is resumed; any other would make it another run.
FREE = {
    *("data", "output", "resume", "finetune", "backbone", "use_ema", "eval_only", "device"),
    *("workers", "log_every", "save_every", "tensorboard", "visualize"),
}


class Task(ABC):
    """What one kind of dense prediction brings to a run.

    Attributes:
        script: the name in messages and checkpoints.
        metrics: of an evaluation, in percent, the one that counts first.
        train, val: data sets with ``classes``, ``__len__`` and ``load``; ``train`` None to evaluate.
    """

    script: str
    metrics: tuple[str, ...]
    train: Any
    val: Any

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, with weights drawn from torch's random generator."""

    def settle(self, here: Processes) -> None:  # noqa: B027  nothing to settle is fine
        """Settle options that depend on the data and on how many processes there are."""

    @abstractmethod
    def augment(self, image: Tensor, target: Any) -> Any:
        """A training example."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: list[Any], here: Processes) -> dict[str, Tensor]:
        """The losses of a batch of `augment`'s results, on this process."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """What the learning rate of a step is multiplied by."""

    @abstractmethod
    def predict(self, model: nn.Module, image: Tensor) -> Any:
        """What is found in one image ``(3, H, W)`` uint8 on the model's device, in its pixels."""

    @abstractmethod
    def judge(self, here: Processes) -> Judge:
        """What compares predictions with the truth."""

    @abstractmethod
    def picture(self, image: Tensor, found: Any) -> Tensor:
        """``found`` (or the truth) drawn over an image ``(3, H, W)`` uint8; the same kind."""


class Judge(ABC):
    @abstractmethod
    def add(self, index: int, found: Any, truth: Any, size: tuple[int, int]) -> None:
        """One image."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """The metrics over the images of all processes, on each of them."""


def main(options: argparse.Namespace, make_task: Callable[[argparse.Namespace], Task]) -> int:
    """The exit status: 0 done, 2 something for the user to put right, 130 stopped and saved."""
    script = options.script
    try:
        settle(options)
        with joined(options.device) as here:
            task = make_task(options)
            task.settle(here)
            if options.eval_only:
                evaluate_only(options, here, task)
            else:
                train(options, here, task)
    except (Problem, MissingExtra) as problem:
        print(f"{script}: {problem}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{script}: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"{script}: stopped at once, without saving", file=sys.stderr)
        return 130
    except Exception as error:
        # Its frames hold the loaders: their workers, deaf to signals, would keep Python from ending.
        traceback.clear_frames(error.__traceback__)
        raise
    return 0


def settle(options: argparse.Namespace) -> None:
    """Settle what depends on the machine and on what is there; raise `Problem` early."""
    settle_machine(options)
    if options.use_ema and options.finetune is None:
        raise Problem("--use-ema: expected --finetune FILE with it, got none")
    if options.eval_only:
        if options.finetune is None or options.resume is not None:
            raise Problem("--eval-only: expected the weights as --finetune FILE, got none there")
        if options.visualize and options.output is None:
            raise Problem("--visualize: expected --output DIR to write the page to, got none")
        return
    settle_output(options, LAST)


def train(options: argparse.Namespace, here: Processes, task: Task) -> None:
    """Train to the last step, or until asked to stop."""
    form = f"casvit_kernels {task.script} 1"
    saved = None if options.resume is None else checkpoint.read(options.resume, form)
    if saved is not None:
        check_resumable(saved, options, task, here)
    if here.first:
        make_directory(options.output)
    run = Run(options, here, task, form)
    if saved is not None:
        run.restore(saved)
    with StopRequest(alone=here.world == 1) as stop:
        logs = None
        if here.first:
            lengths = {} if saved is None else saved["logs"]
            columns = ("step", *task.metrics)
            logs = Logs(options.output, lengths, run.step, options.tensorboard, COLUMNS, columns)
            say(
                f"{options.model}, {options.mixer} mixer: {run.parameters:,} parameters; "
                f"{len(task.train)} images, {options.steps} steps, on {here.world} x {here.device.type}"
            )
        try:
            Loop(options, here, run, task, logs, stop).run()
        finally:
            if logs is not None:
                logs.close()


def evaluate_only(options: argparse.Namespace, here: Processes, task: Task) -> None:
    """Print the metrics of a file's weights on the val images."""
    model = task.build()
    load(model, options, classes_may_differ=False)
    model.to(here.device)
    row = evaluate(task, model, here, options)
    if here.first:
        say(f"{told(row)} of {len(task.val)} images")
        if options.visualize:
            make_directory(options.output)
            pictures.write(options.output / "pictures.html", task, model, options, here.device)


class Run:
    """All that a run is made of, and that its checkpoints hold."""

    def __init__(self, options: argparse.Namespace, here: Processes, task: Task, form: str) -> None:
        self._options, self._here, self._task, self._form = options, here, task, form
        torch.manual_seed(options.seed)
        self.model = task.build()
        if options.resume is None:
            load(self.model, options, classes_may_differ=True)
        self.model.to(here.device)
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        rate = options.lr * options.batch_size * here.world / BATCH_OF_RATE
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, weight_decay=options.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, task.rate)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=options.amp == "fp16")
        self.wrapped: nn.Module = self.model
        if here.world > 1:
            if here.device.type == "cuda":
                # The backbone's norms are frozen; those of a segmenter's head are not.
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            devices = [here.device] if here.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        self.step = 0
        self.best = -1.0
        # Weights are equal everywhere; what is drawn in training is not.
        torch.manual_seed(data.mixed(options.seed, here.rank + 1))

    def update(self, batch: list[Any]) -> Tensor:
        """One step on the batch of this process; its loss."""
        with autocast(self._here.device, self._options.amp):
            loss: Any = sum(self._task.loss(self.wrapped, batch, self._here).values())
        self.scaler.scale(loss).backward()
        if self._options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.schedule.step()
        detached: Tensor = loss.detach()
        return detached

    def save(self, logs: Logs | None) -> None:
        """Write the checkpoint; all processes call this together."""
        states = self._here.gather(checkpoint.random_state(self._here.device))
        if logs is None:
            return
        checkpoint.write(
            self._options.output / LAST,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                # The order of images follows from the seed and this position.
                "step": self.step,
                "random": states,
                "best": self.best,
                "logs": logs.lengths(),
                "classes": list(self._task.train.classes),
                "images": len(self._task.train),
                "options": {key: plain(value) for key, value in vars(self._options).items()},
            },
            self._form,
        )

    def save_best(self, logs: Logs | None) -> None:
        """Write the weights alone."""
        if logs is not None:
            content = {
                "model": self.model.state_dict(),
                self._task.metrics[0]: self.best,
                "classes": list(self._task.train.classes),
            }
            checkpoint.write(self._options.output / BEST, content, self._form)

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what `save` wrote."""
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["scheduler"])
            self.scaler.load_state_dict(saved["scaler"])
            self.step, self.best = saved["step"], saved["best"]
            checkpoint.set_random_state(saved["random"][self._here.rank], self._here.device)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise Problem(
                f"{self._options.resume}: expected a checkpoint of this run, got one that does not "
                f"fit: {str(error).splitlines()[0]}"
            ) from error


class Loop:
    """Steps, evaluations and checkpoints."""

    def __init__(
        self,
        options: argparse.Namespace,
        here: Processes,
        run: Run,
        task: Task,
        logs: Logs | None,
        stop: StopRequest,
    ) -> None:
        self._options, self._here, self._run, self._task = options, here, run, task
        self._logs, self._stop = logs, stop
        plan = stream.Steps(
            *(len(task.train), options.batch_size, options.steps),
            *(here.rank, here.world, options.seed),
        )
        plan.start = run.step
        self._train = data.loader(
            stream.Drawn(task.train, task.augment, options.seed),
            options.workers,
            here.device.type == "cuda",
            stream.listed,
            batch_sampler=plan,
        )

    def run(self) -> None:
        run, options = self._run, self._options
        if run.step >= options.steps:
            self._say(f"{options.output}: all {run.step} steps are done already")
            return
        source = stream.batches(self._train)
        before, seen = time.perf_counter(), 0
        run.wrapped.train()
        with self._progress() as progress:
            while run.step < options.steps:
                batch = next(source)
                rate = run.optimizer.param_groups[0]["lr"]
                loss = run.update(batch)
                images = len(batch) * self._here.world
                seen += images
                progress.update()

                done = run.step == options.steps
                logging = run.step % options.log_every == 0 or done
                judging = run.step % options.eval_every == 0 or done
                saving = judging or (options.save_every > 0 and run.step % options.save_every == 0)
                # A process may only leave with all others: they agree where they meet anyway.
                if not (logging or saving or (self._here.world == 1 and self._stop.made)):
                    continue
                value, asked = self._agree(loss)
                if logging and self._logs is not None:
                    now = time.perf_counter()
                    row = {"step": run.step, "images": images, "loss": value, "lr": rate}
                    row["images_per_second"] = round(seen / (now - before), 1)
                    self._logs.write("train", row)
                    progress.set_postfix(loss=f"{value:.3f}")
                    before, seen = now, 0
                if judging:
                    self._evaluate()
                    before, seen = time.perf_counter(), 0
                if saving or asked:
                    run.save(self._logs)
                if asked and not done:
                    raise Stopped(f"stopped at step {run.step}, saved; continue with --resume auto")
        if options.visualize and self._here.first:
            page = options.output / "pictures.html"
            pictures.write(page, self._task, run.model, options, self._here.device)

    def _evaluate(self) -> None:
        run = self._run
        row = evaluate(self._task, run.model, self._here, self._options)
        run.wrapped.train()
        self._say(f"step {run.step}: {told(row)}")
        if self._logs is not None:
            self._logs.write("val", {"step": run.step, **row})
        if row[self._task.metrics[0]] > run.best:
            run.best = row[self._task.metrics[0]]
            run.save_best(self._logs)

    def _agree(self, loss: Tensor) -> tuple[float, bool]:
        """The mean loss over all processes, and whether one of them shall stop."""
        asked = torch.tensor(float(self._stop.made), device=self._here.device)
        both = self._here.sum(torch.stack([loss.float(), asked])).tolist()
        value = both[0] / self._here.world
        if not math.isfinite(value):
            raise Problem(
                f"step {self._run.step}: expected a finite loss, got {value}; the checkpoints are "
                "from before. A smaller --lr, more --warmup-steps or --clip-grad may help"
            )
        return value, both[1] > 0

    def _progress(self) -> Any:
        return need("tqdm", "dense").tqdm(
            total=self._options.steps,
            initial=self._run.step,
            unit="step",
            leave=False,
            disable=None if self._here.first else True,  # None: shown on a terminal only
        )

    def _say(self, text: str) -> None:
        if self._here.first:
            say(text)


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, here: Processes, options: argparse.Namespace
) -> dict[str, float]:
    """The metrics of the val images, which the processes share."""
    if here.world > 1:  # each has its own running statistics: all use those of the first
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    model.eval()
    judge = task.judge(here)
    share = stream.Share(task.val, here.rank, here.world)
    pin = here.device.type == "cuda"
    loader = data.loader(share, options.workers, pin, stream.listed, batch_size=1)
    shown = need("tqdm", "dense").tqdm(
        stream.batches(loader),
        total=len(share),
        unit="image",
        leave=False,
        disable=None if here.first else True,
    )
    for batch in shown:
        index, image, truth = batch[0]
        with autocast(here.device, options.amp):
            found = task.predict(model, image.to(here.device, non_blocking=True))
        judge.add(index, found, truth, tuple(image.shape[1:]))
    return judge.result()


def told(row: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.2f} %" for name, value in row.items())


def load(model: Any, options: argparse.Namespace, classes_may_differ: bool) -> None:
    """Weights of --finetune into the model, or of --backbone into its backbone."""
    if options.finetune is not None:
        try:
            report = load_dense_checkpoint(model, options.finetune, use_ema=options.use_ema)
        except (CheckpointError, OSError) as error:
            raise Problem(f"--finetune: {error}") from error
        resized = [name for name in report.skipped if name in model.state_dict()]
        if resized and not classes_may_differ:
            raise Problem(f"--finetune: {options.finetune}: {report.skipped[resized[0]]}")
    elif options.backbone is not None:
        body: RCViT = model.backbone.body
        try:
            load_checkpoint(body, options.backbone)
        except (CheckpointError, OSError) as error:
            raise Problem(f"--backbone: {error}") from error


def check_resumable(
    saved: dict[str, Any], options: argparse.Namespace, task: Task, here: Processes
) -> None:
    """Raise `Problem` unless the run goes on as it would have without the interruption."""
    before = saved.get("options", {})
    pairs = [
        (f"--{key.replace('_', '-')}", before.get(key), plain(value))
        for key, value in vars(options).items()
        if key not in FREE
    ]
    pairs.append(("number of processes", len(saved.get("random", ())), here.world))
    pairs.append(("number of training images", saved.get("images"), len(task.train)))
    pairs.append(("classes", saved.get("classes"), list(task.train.classes)))
    changed = [f"{name}: {old}, now {new}" for name, old, new in pairs if old != new]
    if changed:
        raise Problem(
            f"--resume: {options.resume}: expected what it was trained with, got another "
            + "; ".join(changed)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all dense tasks have."""
    from casvit_kernels.models import CONFIGS

    from .arguments import four, integer, number

    whole, positive = integer(0), integer(1)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR|digits", help="see above")
    add("--output", type=Path, metavar="DIR", help=f"{LAST}, {BEST}, logs and pictures go here")
    add("--resume", metavar="FILE|auto", help=f"continue from a checkpoint; auto: {LAST} if there")
    add("--backbone", type=Path, metavar="FILE", help="a classifier's weights, to start from")
    add("--finetune", type=Path, metavar="FILE", help="weights of such a model, published or ours")
    add("--use-ema", action="store_true", help="take the averaged weights of --finetune's file")
    add("--eval-only", action="store_true", help="evaluate --finetune's weights, train nothing")
    add("--visualize", type=whole, default=0, metavar="N", help="val images drawn into a page")

    part = parser.add_argument_group("model")
    add = part.add_argument
    add("--model", choices=sorted(CONFIGS), default="rcvit_xs")
    add("--layers", type=four, metavar="N,N,N,N", help="blocks per stage, other than the model's")
    add("--dims", type=four, metavar="N,N,N,N", help="channels per stage, other than the model's")
    add("--mixer", choices=("fused", "reference"), default="fused")
    add("--drop-path", type=number(0, 1), help="by default the published one of the size")
    add(
        "--norms", choices=("frozen", "trained"), default="frozen", help="BatchNorm of the backbone"
    )

    part = parser.add_argument_group("optimisation")
    add = part.add_argument
    add("--batch-size", type=positive, default=4, help="images per process")
    add("--lr", type=number(0), default=2e-4, help=f"at a total batch of {BATCH_OF_RATE}, scaled")
    add("--weight-decay", type=number(0), default=1e-4)
    add("--clip-grad", type=number(0), help="largest norm of the gradient")
    add("--amp", choices=("auto", "none", "bf16", "fp16"), default="auto", help="auto: on a GPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--channels-last", action="store_true")
    add("--seed", type=whole, default=0)
    add("--workers", type=whole, help="processes that load images, per process; default up to 4")

    part = parser.add_argument_group("records")
    add = part.add_argument
    add("--eval-every", type=positive, metavar="STEPS")
    add("--log-every", type=positive, default=50, metavar="STEPS")
    add("--save-every", type=whole, default=500, metavar="STEPS", help="0: after evaluations only")
    add("--no-tensorboard", dest="tensorboard", action="store_false")


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, digits: dict[str, Any]
) -> argparse.Namespace:
    """The options; with ``--data digits`` others are the defaults."""
    first, _ = parser.parse_known_args(argv)
    if str(first.data) == "digits":
        parser.set_defaults(**digits)
    return parser.parse_args(argv)


def size_of(options: argparse.Namespace) -> Any:
    """The size of the backbone: a name, or a `Config`."""
    from casvit_kernels.models import CONFIGS, Config

    if options.layers is None and options.dims is None:
        return options.model
    config = CONFIGS[options.model]
    return Config(options.layers or config.layers, options.dims or config.dims)
