"""The tables of how exact exported files are."""

from __future__ import annotations

from bench.report.documents import Case, Document


def onnx_table(accuracy: Document) -> list[str]:
    lines = [
        f"Top-1 on {accuracy['images']} handwritten digits that a small fused CAS-ViT was not trained "
        "on. By `python bench/accuracy/int8.py`, "
        f"torch {accuracy['torch']}, ONNX Runtime {accuracy['onnxruntime']}.",
        "",
        "| model | top-1, % | bytes |",
        "|---|---:|---:|",
    ]
    for name, top1 in accuracy["top1"].items():
        size = accuracy["bytes"].get(name)
        title = name if size is None else f"ONNX {name}"
        lines.append(f"| {title} | {top1:.2f} | {'' if size is None else f'{size:,}'} |")
    return lines


def coreml_tables(document: Document) -> list[str]:
    """The tables of docs/coreml.md: networks on photographs, then one on what it was trained for."""
    networks = [(name, rows) for name, rows in document.items() if isinstance(rows, list)]
    photographs = [(n, rows) for n, rows in networks if "right" not in rows[0]]
    head = "| | package, MB | largest error | mean error | error, rms | same top class |"
    rule = "|---|---:|---:|---:|---:|---:|"
    lines = [
        f"Networks with weights from a seed, on {photographs[0][1][0]['images']} photographs "
        f"(torch {document['torch']}, coremltools {document['coremltools']}):",
        "",
        head,
        rule,
    ]
    for name, rows in photographs:
        lines += [_coreml_row(f"{name}, {row['case']}", row) for row in rows]
    for name, rows in networks:
        if "right" not in rows[0]:
            continue
        truth = rows[0]["right_float64"]
        lines += ["", f"{name}:", "", f"{head} right (float64: {truth}) |", f"{rule}---:|"]
        lines += [
            f"{_coreml_row(row['case'], row)} {row['right']} of {row['images']} |" for row in rows
        ]
    return lines


def _coreml_row(title: str, row: Case) -> str:
    return (
        f"| {title} | {row['megabytes']:.2f} | {row['max_error']:.2g} | {row['mean_error']:.2g} | "
        f"{100 * row['relative_rms']:.2g} % | {row['same_top_class']} of {row['images']} |"
    )
