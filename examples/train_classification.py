"""Trains an RCViT on any folder of images by the published recipe (CAS-ViT, arXiv 2408.03703).

python examples/train_classification.py DATA --output RUN
torchrun --standalone --nproc-per-node 8 examples/train_classification.py DATA --output RUN

DATA holds train/<class>/<image> and val/<class>/<image>. docs/training.md tells the rest.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recipe import checkpoint, data
from recipe.arguments import four, integer, number, sizes
from recipe.logs import Logs
from recipe.machine import autocast, make_directory, plain, say, settle_machine, settle_output
from recipe.problem import Problem, Stopped
from recipe.processes import Processes, StopRequest, joined
from torch import Tensor, nn

from casvit_kernels._optional import MissingExtra, need
from casvit_kernels.models import CONFIGS, CheckpointError, Config, RCViT, load_checkpoint

BATCH_OF_RATE = 2048  # the total batch that --lr is meant for
LAST, BEST = "last.pt", "best.pt"
# Settings that may change when a run is resumed; any other would make it another run.
FREE = {
    "data",
    "output",
    "resume",
    "finetune",
    "use_ema",
    "eval_only",
    "device",
    "workers",
    "log_every",
    "save_every",
    "tensorboard",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 2 something for the user to put right, 130 stopped and saved."""
    options = parse(argv)
    try:
        check(options)
        with joined(options.device) as here:
            if options.eval_only:
                evaluate_only(options, here)
            else:
                train(options, here)
    except (Problem, MissingExtra) as problem:
        print(f"train_classification: {problem}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"train_classification: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("train_classification: stopped at once, without saving", file=sys.stderr)
        return 130
    except Exception as error:
        # Its frames hold the loaders: their workers, deaf to signals, would keep Python from ending.
        traceback.clear_frames(error.__traceback__)
        raise
    return 0


def train(options: argparse.Namespace, here: Processes) -> None:
    """Train to the last epoch, or until asked to stop."""
    folders = [data.Folder(options.data / part) for part in ("train", "val")]
    data.check_same_classes(*folders)
    saved = None if options.resume is None else checkpoint.read(options.resume)
    if saved is not None:
        check_resumable(saved, options, folders[0], here)

    if here.first:
        make_directory(options.output)
    run = Run(options, here, folders[0])
    if saved is not None:
        run.restore(saved)
    with StopRequest(alone=here.world == 1) as stop:
        logs = None
        if here.first:
            lengths = {} if saved is None else saved["logs"]
            logs = Logs(options.output, lengths, run.step, options.tensorboard)
            say(
                f"{options.model}, {options.mixer} mixer: {run.parameters:,} parameters; "
                f"{run.plan.steps} steps an epoch, on {here.world} x {here.device.type}"
            )
        try:
            Loop(options, here, run, folders, logs, stop).run()
        finally:
            if logs is not None:
                logs.close()


def evaluate_only(options: argparse.Namespace, here: Processes) -> None:
    """Print the accuracy of a file's weights on the val folder."""
    val = data.Folder(options.data / "val")
    model = build(options, len(val.classes))
    load(model, options, heads_may_differ=False)
    model.to(here.device)
    top1, top5 = evaluate(model, val_loader(options, here, val), here, options.amp)
    if here.first:
        print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(val.samples)} images")


class Run:
    """All that a run is made of, and that its checkpoints hold."""

    def __init__(self, options: argparse.Namespace, here: Processes, images: data.Folder) -> None:
        self._options, self._here, self._images = options, here, images
        torch.manual_seed(options.seed)
        self.model = build(options, len(images.classes))
        if options.finetune is not None and options.resume is None:
            load(self.model, options, heads_may_differ=True)
        self.model.to(here.device)
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.plan = data.Plan(
            len(images.samples),
            options.sizes,
            options.input_size,
            options.batch_size,
            options.accumulate,
            here.rank,
            here.world,
            options.seed,
        )
        optim, scheduler = need("timm.optim", "train"), need("timm.scheduler", "train")
        # Linear in the total batch.
        rate = options.lr * options.batch_size * options.accumulate * here.world / BATCH_OF_RATE
        self.optimizer = torch.optim.AdamW(
            optim.param_groups_weight_decay(self.model, options.weight_decay), lr=rate
        )
        self.schedule = scheduler.CosineLRScheduler(
            self.optimizer,
            t_initial=options.epochs * self.plan.steps,
            lr_min=options.min_lr,
            warmup_t=round(options.warmup_epochs * self.plan.steps),
            warmup_lr_init=min(options.warmup_lr, rate),
            t_in_epochs=False,
        )
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=options.amp == "fp16")
        self.ema = None
        if options.ema > 0:
            self.ema = need("timm.utils", "train").ModelEmaV3(self.model, decay=options.ema)
        self.wrapped: nn.Module = self.model
        if here.world > 1:
            devices = [here.device] if here.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        self._criterion = need("timm.loss", "train").LabelSmoothingCrossEntropy(options.smoothing)
        self.epoch = self.step_in_epoch = self.step = 0
        self.best = -1.0  # top-1 of the best evaluation, of the model or its average
        # Weights are equal everywhere; what is dropped out is not.
        need("timm.utils", "train").random_seed(options.seed + 1, here.rank)

    def update(self, parts: Sequence[data.Batch]) -> Tensor:
        """One step on the batches of this process; their mean loss."""
        total = torch.zeros((), device=self._here.device)
        for index, (images, labels) in enumerate(parts):
            together = index == len(parts) - 1 or self._here.world == 1
            quiet: Any = nullcontext if together else self.wrapped.no_sync
            with quiet():
                with autocast(self._here.device, self._options.amp):
                    loss = self._criterion(self.wrapped(images), labels) / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if self._options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self._options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.step_in_epoch += 1
        self.schedule.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.model)
        return total

    def save(self, logs: Logs | None) -> None:
        """Write the checkpoint; all processes call this together."""
        states = self._here.gather(checkpoint.random_state(self._here.device))
        if logs is None:
            return
        options = {key: plain(value) for key, value in vars(self._options).items()}
        checkpoint.write(
            self._options.output / LAST,
            {
                **self.weights(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                # The order of images follows from the seed and this position.
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "step": self.step,
                "random": states,
                "best": self.best,
                "logs": logs.lengths(),
                "classes": self._images.classes,
                "images": len(self._images.samples),
                "options": options,
            },
        )

    def save_best(self, logs: Logs | None) -> None:
        """Write the weights of the model and its average alone."""
        if logs is not None:
            checkpoint.write(self._options.output / BEST, {**self.weights(), "top1": self.best})

    def weights(self) -> dict[str, Any]:
        weights = {"model": self.model.state_dict()}
        return (
            weights if self.ema is None else weights | {"model_ema": self.ema.module.state_dict()}
        )

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what `save` wrote."""
        try:
            self.model.load_state_dict(saved["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(saved["model_ema"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["scheduler"])
            self.scaler.load_state_dict(saved["scaler"])
            self.epoch, self.step_in_epoch = saved["epoch"], saved["step_in_epoch"]
            self.step, self.best = saved["step"], saved["best"]
            checkpoint.set_random_state(saved["random"][self._here.rank], self._here.device)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise Problem(
                f"{self._options.resume}: expected a checkpoint of this run, got one that does not "
                f"fit: {str(error).splitlines()[0]}"
            ) from error


class Loop:
    """Epochs: train, evaluate, save."""

    def __init__(
        self,
        options: argparse.Namespace,
        here: Processes,
        run: Run,
        folders: Sequence[data.Folder],
        logs: Logs | None,
        stop: StopRequest,
    ) -> None:
        self._options, self._here, self._run = options, here, run
        self._logs, self._stop = logs, stop
        transforms = {size: train_transform(options, size) for size in run.plan.batches}
        self._train = data.loader(
            data.Augmented(folders[0], transforms, options.seed),
            options.workers,
            here.device.type == "cuda",
            batch_sampler=run.plan,
        )
        self._val = val_loader(options, here, folders[1])

    def run(self) -> None:
        run = self._run
        if run.epoch == self._options.epochs:
            self._say(f"{self._options.output}: all {run.epoch} epochs are done already")
        while run.epoch < self._options.epochs:
            self._epoch()
            self._evaluate()
            run.epoch, run.step_in_epoch = run.epoch + 1, 0
            run.save(self._logs)
            self._end_if(self._here.sum(self._asked()) > 0 and run.epoch < self._options.epochs)

    def _epoch(self) -> None:
        run, every = self._run, self._options.save_every
        run.plan.epoch, run.plan.start = run.epoch, run.step_in_epoch
        run.wrapped.train()
        source = data.batches(self._train, self._here.device)
        before, seen = time.perf_counter(), 0
        with self._progress() as progress:
            while run.step_in_epoch < run.plan.steps:
                parts = [next(source) for _ in range(self._options.accumulate)]
                rate = run.optimizer.param_groups[0]["lr"]
                loss = run.update(parts)
                images = sum(len(labels) for _, labels in parts) * self._here.world
                seen += images
                progress.update()

                logging = run.step % self._options.log_every == 0
                saving = every > 0 and run.step % every == 0
                # A process may only leave with all others: they agree where they meet anyway.
                if not (logging or saving or (self._here.world == 1 and self._stop.made)):
                    continue
                value, asked = self._agree(loss)
                if logging and self._logs is not None:
                    now = time.perf_counter()
                    size = parts[0][0].shape[-1]
                    self._logs.write(
                        "train",
                        {
                            "step": run.step,
                            "epoch": run.epoch,
                            "size": size,
                            "images": images,
                            "loss": value,
                            "lr": rate,
                            "images_per_second": round(seen / (now - before), 1),
                        },
                    )
                    progress.set_postfix(loss=f"{value:.3f}", size=size)
                    before, seen = now, 0
                if saving or asked:
                    run.save(self._logs)
                self._end_if(asked)

    def _evaluate(self) -> None:
        run = self._run
        row: dict[str, Any] = {
            "step": run.step,
            "epoch": run.epoch,
            "ema_top1": None,
            "ema_top5": None,
        }
        row["top1"], row["top5"] = evaluate(run.model, self._val, self._here, self._options.amp)
        text = f"epoch {run.epoch}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %"
        best = row["top1"]
        if run.ema is not None:
            row["ema_top1"], row["ema_top5"] = evaluate(
                run.ema.module, self._val, self._here, self._options.amp
            )
            text += f"; averaged weights {row['ema_top1']:.2f} %, {row['ema_top5']:.2f} %"
            best = max(best, row["ema_top1"])
        self._say(text)
        if self._logs is not None:
            self._logs.write("val", row)
        if best > run.best:
            run.best = best
            run.save_best(self._logs)

    def _agree(self, loss: Tensor) -> tuple[float, bool]:
        """The mean loss over all processes, and whether one of them shall stop."""
        both = self._here.sum(torch.stack([loss.float(), self._asked()[0]])).tolist()
        value = both[0] / self._here.world
        if not math.isfinite(value):
            raise Problem(
                f"step {self._run.step}: expected a finite loss, got {value}; the checkpoints are "
                "from before. A smaller --lr, more --warmup-epochs or --clip-grad may help"
            )
        return value, both[1] > 0

    def _asked(self) -> Tensor:
        return torch.tensor([float(self._stop.made)], device=self._here.device)

    def _end_if(self, asked: Tensor | bool) -> None:
        if asked:
            raise Stopped(f"stopped at step {self._run.step}, saved; continue with --resume auto")

    def _progress(self) -> Any:
        return need("tqdm", "train").tqdm(
            total=self._run.plan.steps,
            initial=self._run.step_in_epoch,
            desc=f"epoch {self._run.epoch}",
            unit="step",
            leave=False,
            disable=None if self._here.first else True,  # None: shown on a terminal only
        )

    def _say(self, text: str) -> None:
        if self._here.first:
            say(text)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, here: Processes, amp: str) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent, over the images of all processes."""
    if here.world > 1:  # each has its own running statistics: all use those of the first
        need("timm.utils", "train").distribute_bn(model, here.world)
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=here.device)
    for images, labels in data.batches(loader, here.device):
        with autocast(here.device, amp):
            logits = model(images)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), torch.ones_like(labels).sum()])
    top1, top5, images = here.sum(counts).tolist()
    return 100 * top1 / images, 100 * top5 / images


def build(options: argparse.Namespace, classes: int) -> RCViT:
    """The model, with weights drawn from torch's random generator."""
    config = CONFIGS[options.model]
    layers, dims = options.layers or config.layers, options.dims or config.dims
    return RCViT(
        Config(layers, dims),
        num_classes=classes,
        distillation=False,  # there is no teacher here
        drop_path_rate=options.drop_path,
        fused=options.mixer == "fused",
    )


def load(model: nn.Module, options: argparse.Namespace, heads_may_differ: bool) -> None:
    """Weights of --finetune into the model."""
    try:
        report = load_checkpoint(model, options.finetune, use_ema=options.use_ema)
    except (CheckpointError, OSError) as error:
        raise Problem(f"--finetune: {error}") from error
    resized = [name for name in report.skipped if name in model.state_dict()]
    if resized and not heads_may_differ:
        raise Problem(f"--finetune: {options.finetune}: {report.skipped[resized[0]]}")


def train_transform(options: argparse.Namespace, size: int) -> Any:
    """Random crop, mirroring and RandAugment, to a normalised tensor."""
    none = options.auto_augment == "none"
    create = need("timm.data", "train").create_transform
    try:
        transform = create(
            size,
            is_training=True,
            scale=tuple(options.crop_scale),
            hflip=options.hflip,
            color_jitter=None,
            auto_augment=None if none else options.auto_augment,
            interpolation="bicubic",
        )
    except (AssertionError, KeyError, ValueError) as error:  # what timm's parser raises
        raise Problem(
            "--auto-augment: expected timm's notation, such as rand-m9-mstd0.5-inc1, or none; "
            f"got {options.auto_augment!r}"
        ) from error
    for part in transform.transforms:
        for operation in getattr(part, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(at_least_one_bit, operation.level_fn)
    return transform


def at_least_one_bit(level: Callable[..., tuple[int]], *arguments: Any) -> tuple[int]:
    """timm at its full strength asks for images of 0 bits, and newer Pillow refuses them."""
    return (max(1, level(*arguments)[0]),)


def val_loader(options: argparse.Namespace, here: Processes, val: data.Folder) -> Any:
    transform = need("timm.data", "train").create_transform(
        options.input_size, interpolation="bicubic", crop_pct=options.crop_pct
    )
    images = data.Plain(val, transform, here.rank, here.world)
    pin = here.device.type == "cuda"
    return data.loader(images, options.workers, pin, batch_size=options.batch_size)


def check(options: argparse.Namespace) -> None:
    """Settle what depends on the machine and on what is there; raise `Problem` early."""
    settle_machine(options)
    if options.sizes is None:
        options.sizes = default_sizes(options.input_size)
    if options.warmup_epochs is None:
        options.warmup_epochs = options.epochs / 15
    if options.warmup_epochs >= options.epochs:
        raise Problem(
            f"--warmup-epochs: expected fewer than --epochs {options.epochs}, "
            f"got {options.warmup_epochs:g}"
        )
    if options.use_ema and options.finetune is None:
        raise Problem("--use-ema: expected --finetune FILE with it, got none")
    if options.eval_only:
        if options.finetune is None or options.resume is not None:
            raise Problem("--eval-only: expected the weights as --finetune FILE, got none there")
        return
    settle_output(options, LAST)


def check_resumable(
    saved: dict[str, Any], options: argparse.Namespace, images: data.Folder, here: Processes
) -> None:
    """Raise `Problem` unless the run goes on as it would have without the interruption."""
    before = saved.get("options", {})
    now = {key: plain(value) for key, value in vars(options).items()}
    pairs = [
        (f"--{key.replace('_', '-')}", before.get(key), value)
        for key, value in now.items()
        if key not in FREE
    ]
    pairs.append(("number of processes", len(saved.get("random", ())), here.world))
    pairs.append(("number of training images", saved.get("images"), len(images.samples)))
    pairs.append(("classes", saved.get("classes"), images.classes))
    changed = [f"{name}: {old}, now {new}" for name, old, new in pairs if old != new]
    if changed:
        raise Problem(
            f"--resume: {options.resume}: expected what it was trained with, got another "
            + "; ".join(changed)
        )


def default_sizes(size: int) -> tuple[int, ...]:
    """Multiples of 32 from 5/7 to 10/7 of `size` (160 to 320 for 224), else `size` alone."""
    sizes = range(-(-size * 5 // 7 // 32) * 32, size * 10 // 7 + 1, 32)
    return tuple(sizes) or (size,)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole, positive = integer(0), integer(1)
    add = parser.add_argument
    add("data", type=Path, help="folder with train/<class>/<image> and val/<class>/<image>")
    add("--output", type=Path, metavar="DIR", help=f"{LAST}, {BEST} and the logs go here")
    add("--resume", metavar="FILE|auto", help=f"continue from a checkpoint; auto: {LAST} if there")
    add("--finetune", type=Path, metavar="FILE", help="start from these weights")
    add("--use-ema", action="store_true", help="take the averaged weights of --finetune's file")
    add("--eval-only", action="store_true", help="evaluate --finetune's weights, train nothing")

    part = parser.add_argument_group("model")
    add = part.add_argument
    add("--model", choices=sorted(CONFIGS), default="rcvit_xs")
    add("--layers", type=four, metavar="N,N,N,N", help="blocks per stage, other than the model's")
    add("--dims", type=four, metavar="N,N,N,N", help="channels per stage, other than the model's")
    add("--mixer", choices=("fused", "reference"), default="fused")
    add("--drop-path", type=number(0, 1), default=0.1, help="stochastic depth of the last block")

    part = parser.add_argument_group("images")
    add = part.add_argument
    add("--input-size", type=positive, default=224, help="pixels of the side, in evaluation")
    add("--sizes", type=sizes, metavar="N,N,...", help="in training; by default around the former")
    add("--crop-pct", type=number(0.1, 1), default=0.875, help="part of the side evaluated")
    add(
        "--crop-scale",
        type=number(0.01, 1),
        nargs=2,
        default=(0.08, 1.0),
        metavar="AREA",
        help="least and largest part of the area trained on",
    )
    add("--hflip", type=number(0, 1), default=0.5, help="probability")
    add("--auto-augment", default="rand-m9-mstd0.5-inc1", help="timm's notation, or none")
    add("--workers", type=whole, help="processes that load images, per process; default up to 4")

    part = parser.add_argument_group("optimisation")
    add = part.add_argument
    add("--epochs", type=positive, default=300)
    add("--batch-size", type=integer(2), default=128, help="per process, at --input-size")
    add("--accumulate", type=positive, default=1, help="batches per step")
    add("--lr", type=number(0), default=6e-3, help=f"at a total batch of {BATCH_OF_RATE}, scaled")
    add("--min-lr", type=number(0), default=1e-6)
    add("--warmup-lr", type=number(0), default=1e-6)
    add("--warmup-epochs", type=number(0), help="by default a fifteenth of --epochs")
    add("--weight-decay", type=number(0), default=0.05)
    add("--smoothing", type=number(0, 0.99), default=0.1, help="of labels")
    add("--clip-grad", type=number(0), help="largest norm of the gradient")
    add("--ema", type=number(0, 1), default=0.9995, help="decay of the averaged weights; 0: none")
    add(
        "--amp",
        choices=("auto", "none", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 or fp16 on a GPU, none on a CPU",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--channels-last", action="store_true")
    add("--seed", type=whole, default=0)

    part = parser.add_argument_group("records")
    add = part.add_argument
    add("--log-every", type=positive, default=10, metavar="STEPS")
    add("--save-every", type=whole, default=500, metavar="STEPS", help="0: after epochs only")
    add("--no-tensorboard", dest="tensorboard", action="store_false")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
