"""The table of what autograd keeps."""

from __future__ import annotations

from bench.report.documents import Document


def kept_table(kept: Document) -> list[str]:
    """Mixers down; bytes of plain PyTorch and of the fused CPU backend across."""
    lines = [
        "Bytes that autograd keeps between forward and backward of a mixer in training mode: float32, "
        "the input counted, parameters not. "
        f"By `python bench/static/saved_bytes.py`, torch {kept['torch']}.",
        "",
        "| mixer | plain PyTorch | fused | times less |",
        "|---|---:|---:|---:|",
    ]
    for row in kept["rows"]:
        title = f"{row['model']} stage {row['stage']}, ({', '.join(map(str, row['shape']))})"
        eager, fused = row["eager_bytes"], row["fused_bytes"]
        lines.append(f"| {title} | {eager:,} | {fused:,} | {eager / fused:.1f}x |")
    return lines
