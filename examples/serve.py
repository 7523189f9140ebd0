"""Classifies a directory of images on the CPU, a batch at a time, with the whole network in one call.

python examples/serve.py IMAGES --checkpoint rcvit_xs.pth
python examples/serve.py IMAGES --checkpoint rcvit_t.pth --model rcvit_t --batch 8 --precision bf16

Images are decoded in the background and go to the network as uint8: it normalises them itself. The five
likeliest classes of each are written to a JSON file at the end, or when Ctrl-C asks for an end. A file
that cannot be read is named and left out. docs/serving.md says how to choose threads, batch, precision.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from recipe.arguments import integer, number
from recipe.problem import Problem
from torch import Tensor, nn

from casvit_kernels import BackendUnavailable, fuse_network, models
from casvit_kernels._files import NotWritten, check_writable, write_text
from casvit_kernels._optional import MissingExtra, need

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of the published training
TOP = 5
INTERRUPTED = 130


class Image(NamedTuple):
    """A file, and its pixels or the reason why there are none."""

    name: str
    pixels: Tensor | None  # (S, S, 3), uint8
    reason: str = ""


class Stop:
    """Ctrl-C: the first ends the loop after the batch that is being computed, the second at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 2 something for the user to put right, 130 stopped and written."""
    options = parse(argv)
    try:
        return serve(options)
    except (Problem, MissingExtra, NotWritten, BackendUnavailable, ValueError) as problem:
        print(f"serve: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("serve: stopped at once, nothing was written", file=sys.stderr)
        return INTERRUPTED


def serve(options: argparse.Namespace) -> int:
    """Everything that can be wrong with the options is said before any image is read."""
    for package in ("PIL", "numpy", "tqdm"):
        need(package, "demo")
    check_writable(options.output, "--output")
    paths = images_of(options.images)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    network = build(options)
    found: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with Stop() as stop, ThreadPoolExecutor(options.decoders) as pool:
        images = decoded(paths, options, pool)
        seconds = classify(network, images, len(paths), options.batch, stop, found, failed)
        pool.shutdown(wait=False, cancel_futures=True)
    rate = len(found) / seconds if seconds else 0.0
    document = {
        "model": options.model,
        "checkpoint": None if options.checkpoint is None else str(options.checkpoint),
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "batch": options.batch,
        "complete": not stop.asked,
        "images_per_second": round(rate, 2),
        "images": found,
        "failed": failed,
    }
    write_text(options.output, json.dumps(document, indent=1) + "\n", "--output")
    left = len(paths) - len(found) - len(failed)
    print(
        f"{len(found)} images, {rate:.1f} a second, {len(failed)} could not be read"
        + (f", {left} left when stopped" if stop.asked else "")
        + f": {options.output}"
    )
    return INTERRUPTED if stop.asked else 0


def images_of(folder: Path) -> list[Path]:
    """All images in it and below, by name."""
    if not folder.is_dir():
        raise Problem(f"IMAGES: expected a directory with images, got {folder}")
    known = need("PIL.Image", "demo").registered_extensions()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file())
    if not paths:
        raise Problem(f"IMAGES: expected at least one image (jpg, png, ...) in {folder}, got none")
    return paths


def build(options: argparse.Namespace) -> nn.Module:
    """The network in one call, that takes uint8 images."""
    torch.manual_seed(0)
    model: nn.Module = getattr(models, options.model)(num_classes=options.classes)
    if options.checkpoint is None:
        print(
            "serve: no --checkpoint: weights are untrained, classes mean nothing", file=sys.stderr
        )
    elif not options.checkpoint.is_file():
        raise Problem(f"--checkpoint: expected a checkpoint file, got {options.checkpoint}")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said below
            report = models.load_checkpoint(model, options.checkpoint)
        if report.skipped:  # heads of another number of classes would stay random
            key, why = next(iter(report.skipped.items()))
            raise Problem(
                f"--classes: expected the checkpoint's number, got {options.classes} ({key}: {why})"
            )
    return fuse_network(model.eval(), precision=options.precision, normalize=(MEAN, STD))


def decoded(
    paths: Sequence[Path], options: argparse.Namespace, pool: ThreadPoolExecutor
) -> Iterator[Image]:
    """The images in order, decoded ahead of time by the pool: two batches, and one in each thread."""
    ahead: deque[Future[Image]] = deque()
    waiting = iter(paths)
    limit = 2 * options.batch + options.decoders
    while True:
        for path in waiting:
            ahead.append(pool.submit(read, path, options))
            if len(ahead) >= limit:
                break
        if not ahead:
            return
        yield ahead.popleft().result()


def read(path: Path, options: argparse.Namespace) -> Image:
    """The short side scaled, the middle cut out, as in the published evaluation."""
    pillow, ops = need("PIL.Image", "demo"), need("PIL.ImageOps", "demo")
    name = path.relative_to(options.images).as_posix()
    try:
        with pillow.open(path) as opened:
            # JPEG can be decoded at a fraction of its size; two times what is needed keeps it sharp.
            opened.draft("RGB", (2 * options.size, 2 * options.size))
            upright = ops.exif_transpose(opened).convert("RGB")
    # Pillow's decoders raise far more than OSError on a damaged file.
    except Exception as error:
        return Image(name, None, " ".join(str(error).split()) or type(error).__name__)
    side = round(options.size / options.crop_pct)
    fitted = ops.fit(upright, (side, side), pillow.Resampling.BICUBIC)
    first = (side - options.size) // 2
    cut = fitted.crop((first, first, first + options.size, first + options.size))
    pixels = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8)
    return Image(name, pixels.view(options.size, options.size, 3))


def classify(
    network: nn.Module,
    images: Iterable[Image],
    count: int,
    batch: int,
    stop: Stop,
    found: list[dict[str, Any]],
    failed: list[dict[str, str]],
) -> float:
    """Fill `found` and `failed`; the seconds that it took."""
    tqdm = need("tqdm", "demo").tqdm
    waiting: list[Image] = []
    begin = time.perf_counter()
    with tqdm(total=count, unit=" images", file=sys.stderr, dynamic_ncols=True) as bar:
        for image in images:
            if image.pixels is None:
                failed.append({"file": image.name, "reason": image.reason})
                bar.write(f"serve: skipped {image.name}: {image.reason}", file=sys.stderr)
                bar.update()
            else:
                waiting.append(image)
            if len(waiting) == batch:
                found += answers(network, waiting)
                bar.update(len(waiting))
                waiting = []
            if stop.asked:
                return time.perf_counter() - begin
        if waiting:
            found += answers(network, waiting)
            bar.update(len(waiting))
    return time.perf_counter() - begin


@torch.inference_mode()
def answers(network: nn.Module, images: Sequence[Image]) -> list[dict[str, Any]]:
    """The likeliest classes of a batch."""
    pixels = [image.pixels for image in images if image.pixels is not None]
    x = torch.stack(pixels).permute(0, 3, 1, 2)  # (B, 3, S, S), channels last: nothing is copied
    top = network(x).softmax(1).topk(TOP)
    return [
        {
            "file": image.name,
            "top5": [
                {"class": index, "probability": round(value, 6)}
                for value, index in zip(values, indices, strict=True)
            ],
        }
        for image, values, indices in zip(
            images, top.values.tolist(), top.indices.tolist(), strict=True
        )
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status: 0 done; 2 wrong usage or input; 130 stopped, what is done is written",
    )
    add, positive = parser.add_argument, integer(1)
    add("images", type=Path, metavar="IMAGES", help="a directory; those below it are read too")
    add("--output", type=Path, default=Path("predictions.json"), help="(%(default)s)")
    add("--model", choices=tuple(models.CONFIGS), default="rcvit_xs", help="(%(default)s)")
    add("--checkpoint", type=Path, metavar="PATH", help="trained weights (untrained ones)")
    add("--classes", type=integer(TOP), default=1000, help="of the checkpoint (%(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="(%(default)s)")
    add("--batch", type=positive, default=8, help="images in a call (%(default)s)")
    threads = torch.get_num_threads()
    add("--threads", type=positive, help=f"of the network (those of PyTorch: {threads})")
    add("--decoders", type=positive, default=2, help="threads that read images (%(default)s)")
    add("--size", type=integer(32), default=224, help="pixels of the side (%(default)s)")
    add("--crop-pct", type=number(0.1, 1), default=0.875, help="part of the side (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
