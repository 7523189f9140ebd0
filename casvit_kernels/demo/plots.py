"""The report's pictures: inline SVG that takes the page's colours, and small embedded JPEGs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._optional import need

TILE = 168  # pixels of one heat map
MAP = "inferno"

# Matplotlib knows no CSS: it draws in these, and the page's variables take their place.
_INK, _MUTED, _ACCENT, _PLAIN = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _ACCENT: "var(--accent)",
    _PLAIN: "var(--plain)",
}

# What a file of its own needs and a part of a page does not.
_INLINE = (
    (r"<metadata>.*?</metadata>|<style.*?</style>", ""),
    (r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', ""),
    (r'(?<=<g) id="[^"]*"', ""),  # numbered from 1 in every figure; nothing refers to them
    (r' (?:width|height)="[\d.]+pt"', ""),  # the viewBox keeps the shape
    (r'font: ([\d.]+px)[^;"]*', r"font-size: \1"),
    (r"font-family: [^;\"]*;? ?", ""),
)


class Bar(NamedTuple):
    name: str
    value: float
    low: float
    high: float
    label: str
    accent: bool


def bars(items: Sequence[Bar], axis: str) -> str:
    """Horizontal bars with their spread, first item on top."""
    with _style():
        figure, ax = _figure(height=0.7 + 0.38 * len(items))
        for row, item in enumerate(items):
            ax.barh(row, item.value, 0.62, color=_ACCENT if item.accent else _PLAIN)
            ax.hlines(row, item.low, item.high, color=_INK, linewidth=1.2)
            ax.annotate(
                item.label,
                (max(item.high, item.value), row),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
            )
        ax.set_yticks(range(len(items)), [item.name for item in items], color=_INK)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.2 * max(item.high for item in items))
        ax.set_xlabel(axis)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        return _svg(figure)


def curves(reference: Sequence[float], fused: Sequence[float]) -> str:
    """Two loss curves over each other: the first wide, the second thin upon it."""
    with _style():
        figure, ax = _figure(height=4.0)
        steps = range(1, len(reference) + 1)
        ax.plot(steps, reference, color=_PLAIN, linewidth=6, label="reference")
        ax.plot(steps, fused, color=_ACCENT, linewidth=1.6, label="fused")
        ax.set_ylim(bottom=0)
        ax.set_xlim(1, max(2, len(reference)))
        ax.set_xlabel("step")
        ax.set_ylabel("training loss (cross entropy)")
        ax.legend(frameon=False, labelcolor=_INK)
        return _svg(figure)


def photograph(pixels: Tensor) -> str:
    """Data URI of ``(H, W, 3)`` uint8, at tile size."""
    return _jpeg(_resized(pixels))


def heat_map(pixels: Tensor, gate: Tensor, low: float, high: float) -> str:
    """Data URI of a gate ``(h, w)`` in colour, from `low` to `high`, over the dimmed photograph."""
    colours = need("matplotlib").colormaps[MAP]
    scaled = ((gate - low) / max(high - low, 1e-12)).clamp(0, 1)
    scaled = F.interpolate(scaled[None, None], (TILE, TILE), mode="bilinear")[0, 0]
    heat = torch.from_numpy(colours(scaled.numpy())[..., :3]).float()
    grey = _resized(pixels).float().mean(-1, keepdim=True).expand(-1, -1, 3) / 255
    return _jpeg(((0.7 * heat + 0.3 * grey) * 255).round().to(torch.uint8))


def scale_gradient() -> str:
    """The colours of the heat maps as a CSS gradient, low to high."""
    matplotlib = need("matplotlib")
    to_hex = need("matplotlib.colors").to_hex
    stops = ", ".join(to_hex(matplotlib.colormaps[MAP](i / 8)) for i in range(9))
    return f"linear-gradient(to right, {stops})"


def _style() -> Any:
    return need("matplotlib").rc_context(
        {
            "svg.fonttype": "none",  # text stays text, in the page's font
            "font.family": "sans-serif",
            "font.size": 11,
            "text.color": _INK,
            "axes.edgecolor": _MUTED,
            "axes.labelcolor": _MUTED,
            "xtick.color": _MUTED,
            "ytick.color": _MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def _figure(height: float) -> tuple[Any, Any]:
    # The figure class itself, not pyplot: no global state, no display.
    figure = need("matplotlib.figure").Figure(figsize=(11, height), layout="constrained")
    figure.patch.set_alpha(0)
    ax = figure.add_subplot()
    ax.patch.set_alpha(0)
    return figure, ax


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in _INLINE:
        text = re.sub(pattern, replacement, text, flags=re.S)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _resized(pixels: Tensor) -> Tensor:
    channels_first = pixels.permute(2, 0, 1)[None].float()
    small = F.interpolate(channels_first, (TILE, TILE), mode="bilinear", antialias=True)
    return small[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def _jpeg(pixels: Tensor) -> str:
    out = io.BytesIO()
    need("PIL.Image").fromarray(pixels.numpy()).save(out, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
