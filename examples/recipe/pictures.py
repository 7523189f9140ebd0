"""A page of images with what is found in them beside what is there."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casvit_kernels import _files

from .data import Unreadable
from .machine import autocast
from .problem import Problem

_PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;margin:2em}}figure{{display:inline-block;margin:.5em}}
img{{min-width:240px;max-width:45vw;image-rendering:pixelated}}li{{display:inline;margin-right:1em}}
i{{display:inline-block;width:1em;height:1em;margin-right:.3em}}</style>
<h1>{title}</h1><ul>{legend}</ul>
{rows}
"""


@torch.no_grad()
def write(path: Path, task: Any, model: nn.Module, options: Any, device: torch.device) -> None:
    """The first ``options.visualize`` images of ``task.val``, as one HTML file without others beside.

    Raises:
        Problem: an image cannot be read, or the file cannot be written; what was there is kept.
    """
    model.eval()
    rows = []
    for index in range(min(options.visualize, len(task.val))):
        item = task.val.load(index)
        if isinstance(item, Unreadable):
            raise Problem(item.message)
        image, truth = item
        with autocast(device, options.amp):
            found = task.predict(model, image.to(device))
        figures = [
            f'<figure><img src="{_encoded(task.picture(image, what))}" alt="{name}">'
            f"<figcaption>image {index}: {name}</figcaption></figure>"
            for name, what in (("found", found), ("truth", truth))
        ]
        rows.append(f"<div>{''.join(figures)}</div>")
    legend = "".join(
        f'<li><i style="background:rgb{colour(n)}"></i>{html.escape(name)}</li>'
        for n, name in enumerate(task.val.classes)
    )
    page = _PAGE.format(title=html.escape(task.script), legend=legend, rows="\n".join(rows))
    try:
        _files.write_text(path, page)
    except OSError as error:
        raise Problem(f"{path}: cannot be written: {error}") from error


def colour(label: int) -> tuple[int, int, int]:
    """Of a class, told apart well from its neighbours."""
    bits = [0, 0, 0]
    rest = label + 1
    for shift in range(7, -1, -1):
        for channel in range(3):
            bits[channel] |= ((rest >> channel) & 1) << shift
        rest >>= 3
    return bits[0], bits[1], bits[2]


def boxes(
    image: Tensor, found: dict[str, Tensor], classes: Any, least: float, side: int = 1
) -> Tensor:
    """Boxes, masks, names and scores of at least ``least`` over an image ``(3, H, W)`` uint8.

    An image smaller than ``side`` is shown some whole times as large, so that names can be read.
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    found = {name: value.cpu() for name, value in found.items()}
    times = -(-side // min(image.shape[1:]))
    if times > 1:
        image = _enlarged(image, times)
        found["boxes"] = found["boxes"] * times
        if "masks" in found:
            found["masks"] = _enlarged(found["masks"], times)
    scores = found.get("scores", torch.ones(len(found["labels"])))
    kept = scores >= least
    labels = found["labels"][kept].tolist()
    colours: Any = [colour(label - 1) for label in labels]
    if not labels:
        return image.cpu()
    out = image.cpu()
    if "masks" in found:
        masks = found["masks"][kept]
        masks = masks[:, 0] > 0.5 if masks.dim() == 4 else masks > 0
        out = draw_segmentation_masks(out, masks, 0.5, colours)
    names = [
        f"{classes[label - 1]} {score:.2f}" if "scores" in found else str(classes[label - 1])
        for label, score in zip(labels, scores[kept].tolist(), strict=True)
    ]
    return draw_bounding_boxes(out, found["boxes"][kept], names, colours)


def _enlarged(maps: Tensor, times: int) -> Tensor:
    return maps.repeat_interleave(times, -1).repeat_interleave(times, -2)


def label_map(image: Tensor, labels: Tensor, classes: Any) -> Tensor:
    """A label map ``(H, W)`` over an image ``(3, H, W)`` uint8; what has no label stays as it is."""
    labels = labels.cpu()
    table = torch.tensor([colour(n) for n in range(len(classes))], dtype=torch.float32)
    known = labels < len(classes)
    paint = table[labels.clamp(max=len(classes) - 1)].permute(2, 0, 1)
    mixed = (0.4 * image.cpu() + 0.6 * paint).byte()
    return torch.where(known, mixed, image.cpu())


def _encoded(image: Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
