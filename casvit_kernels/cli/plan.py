"""`casvit-kernels plan`: how the CUDA kernels cut a mixer's maps on a GPU, which need not be here."""

from __future__ import annotations

import argparse
from typing import Any

from ..backends import BackendUnavailable
from ..demo.terminal import paragraph, table
from ..ops.mixer.plans import DEVICES, plan
from .arguments import Outcome, Refused, add_verb, positive


def add(verbs: Any) -> None:
    """The parser of this verb."""
    verb = add_verb(
        verbs,
        "plan",
        run,
        "how the CUDA kernels cut a mixer's maps on a GPU",
        "Needs no GPU. Estimates are instructions counted from machine code, not times.",
        "casvit-kernels plan --dim 48 --size 56 --batch 256 --arch sm_90",
    )
    verb.add_argument("--dim", type=positive, required=True, metavar="C", help="channels")
    verb.add_argument("--size", type=positive, required=True, metavar="N", help="height and width")
    verb.add_argument("--width", type=positive, metavar="N", help="width, where it is another")
    verb.add_argument(
        "--batch", type=positive, default=256, metavar="B", help="images (default: %(default)s)"
    )
    verb.add_argument(
        "--arch", choices=tuple(DEVICES), default="sm_90", metavar="ARCH",
        help=f"one of {', '.join(DEVICES)} (default: %(default)s)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Outcome:
    device = DEVICES[arguments.arch]
    shape = (arguments.batch, arguments.dim, arguments.size, arguments.width or arguments.size)
    try:
        kernels = plan(shape, device)
    except (BackendUnavailable, ValueError) as error:
        raise Refused(str(error)) from error
    document = {
        "command": "plan",
        "shape": shape,
        "arch": arguments.arch,
        "device": device._asdict(),
        "kernels": kernels,
    }
    return Outcome(document, _text(document))


def _text(document: dict[str, Any]) -> str:
    device, pixels = document["device"], 1
    for size in document["shape"]:
        pixels *= size
    rows, reasons = [], []
    for k in document["kernels"]:
        if "reason" in k:
            reasons.append(f"{k['kernel']}: none, {k['reason']}.")
            continue
        cut = f"{k['images']} x {k['rows']} x {k['columns']} x {k['channels']}"
        each = k["warp_instructions"] * device["multiprocessors"] * 32 / pixels
        rows.append(
            [
                k["kernel"] if k["chosen"] else f"({k['kernel']})",
                cut + (", halo" if k["halo"] else ""),
                f"{k['shared_bytes']:,}",
                f"{k['blocks']:,}" + (f" by {k['cluster']}" if k["cluster"] > 1 else ""),
                f"{each:.0f}",
            ]
        )
    b, c, height, width = document["shape"]
    parts = [
        paragraph(
            f"{b} images, {c} channels, {height}x{width}, on {document['arch']} ({device['name']}, "
            f"{device['multiprocessors']} multiprocessors):"
        )
    ]
    heads = [
        "kernel",
        "images x rows x columns x channels",
        "shared bytes",
        "blocks",
        "instructions",
    ]
    if rows:
        parts.append(table(heads, rows))
        parts.append(
            paragraph(
                "Instructions: of a thread for each pixel and channel of the output, estimated, with "
                "what a last round of blocks leaves idle. In brackets: not launched, as the planner "
                "expects more of the others. Blocks by n: of clusters. Nothing here is a time."
            )
        )
    if reasons:
        parts += [paragraph(text) for text in reasons]
        parts.append(
            paragraph(
                "Without a single pass gates and combine are two launches. Where one of the backward's "
                "has none, it is Triton's."
            )
        )
    return "\n\n".join(parts)
