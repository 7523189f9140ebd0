"""Turns the results under bench/results/ into the tables and the picture of README and docs, and into
the numbers by which the package chooses between GPU backends and judges a CPU.

    python bench/report            write them
    python bench/report --check    exit 1 where they are not what the results give

Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.report import figure2, token_speed, tokens
from bench.report.accuracy import coreml_tables
from bench.report.complete import complete_tables
from bench.report.cpu_numbers import module as cpu_module
from bench.report.dense_digits import DIGITS_MARKS, digits_table
from bench.report.documents import ReportError
from bench.report.floor import FLOOR_MARKS, KEPT_MARKS, kept_table, load_floor
from bench.report.gpu_order import module as gpu_module
from bench.report.load import (
    KEPT,
    load,
    load_accuracy,
    load_coreml,
    load_digits,
    load_gpu,
    load_kept,
    load_token_vits,
    load_tokens,
)
from bench.report.performance import performance
from bench.report.readme import readme_table
from bench.report.svg import picture

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COREML_MARKS = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"


def with_table(
    text: str, table: str, file: str = "README.md", marks: tuple[str, str] = (BEGIN, END)
) -> str:
    """`text` with what stands between its markers replaced.

    Raises:
        ReportError: the markers are not there, once each and in order.
    """
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"{file}: expected the markers {begin} and {end}, once each, in order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def outputs(root: Path) -> dict[Path, str]:
    """What each generated file should hold.

    Raises:
        ReportError: as `load` and `with_table`; or there is no README.md.
    """
    readme = root / "README.md"
    if not readme.is_file():
        raise ReportError(f"README.md: expected a file at {readme}")
    results = root / "bench" / "results"
    documents, kept, gpus = load(results), load_kept(results), load_gpu(results)
    accuracy, coreml = load_accuracy(results), load_coreml(results)
    found = {
        readme: with_table(readme.read_text(encoding="utf-8"), readme_table(documents)),
        root / "docs" / "performance.md": performance(documents, gpus),
        root / "docs" / "bench.svg": picture(documents),
        root / "docs" / "mixers.md": figure2.page(documents),
        root / "docs" / "mixers.svg": figure2.picture(documents),
        results / "README.md": complete_tables(documents, kept, gpus, accuracy),
    }
    if documents:
        found[root / "casvit_kernels" / "doctor" / "cpu_numbers.py"] = cpu_module(documents)
    static = results / "cuda_kernels.json"
    if static.is_file():
        found[root / "casvit_kernels" / "backends" / "gpu_numbers.py"] = gpu_module(static, gpus)
    if coreml is not None:
        page = root / "docs" / "coreml.md"
        if not page.is_file():
            raise ReportError(f"docs/coreml.md: expected a file at {page}")
        tables = "\n".join(coreml_tables(coreml))
        name = "docs/coreml.md"
        found[page] = with_table(page.read_text(encoding="utf-8"), tables, name, COREML_MARKS)
    digits = load_digits(results)
    if digits is not None:
        name = "docs/dense_prediction.md"
        page = root / name
        if not page.is_file():
            raise ReportError(f"{name}: expected a file at {page}")
        tables = "\n".join(digits_table(digits))
        found[page] = with_table(page.read_text(encoding="utf-8"), tables, name, DIGITS_MARKS)
    name = "docs/how_it_works.md"
    how = root / name
    if how.is_file():
        if kept is None:
            raise ReportError(f"{name}: expected {results / KEPT}")
        text = how.read_text(encoding="utf-8")
        text = with_table(text, "\n".join(load_floor(root)), name, FLOOR_MARKS)
        found[how] = with_table(text, "\n".join(kept_table(kept)), name, KEPT_MARKS)
    vits = load_token_vits(results)
    if vits is not None:
        found[root / "docs" / "token_speed.md"] = token_speed.page(vits)
    clustering = load_tokens(results)
    if clustering is not None:
        found[root / "docs" / "token_clustering.md"] = tokens.page(clustering)
        found[root / "docs" / "token_clustering.svg"] = tokens.picture(clustering)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    options = parser.parse_args(arguments)
    try:
        wanted = outputs(options.root)
    except ReportError as error:
        print(f"bench/report: {error}", file=sys.stderr)
        return 2
    stale = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if options.check:
            print(f"{path} is not what bench/results/ gives: run python bench/report")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if options.check and stale else 0
