"""The page and the picture of token clustering say what the results file says."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.report import command, tokens  # noqa: E402

MADE = {"torch": "2.15.0", "date": "2026-11-29T08:00:00+00:00", "threads": 2, "cpu": "a CPU"}


def document(published=(79.8, 59.8), rival=(79.0, 59.0), speed=1.3):
    """Two seeds, one grid, two methods; full mIoUs of 80 and 60."""
    timed = {} if speed is None else {"speed": speed, "median_s": 0.01}
    rows = [
        {"method": name, "at": 4, "grid": [20, 20], "miou": list(miou), **timed}
        for name, miou in (
            ("clustering, as published", published),
            ("average pooling, nearest", rival),
        )
    ]
    more = {} if speed is None else {"speed_environment": MADE, "speed_backend": "cpu"}
    return {
        "environment": MADE,
        "recipe": {"depth": 10, "width": 64},
        "seeds": [0, 1],
        "scenes": 48,
        "size": [28, 28],
        "full": [80.0, 60.0],
        "tuned": [{"temperature": 0.1, "miou": {}}] * 2,
        "rows": rows,
        **more,
    }


def test_cells_are_means_over_seeds_of_what_is_kept():
    text = tokens.page(document())
    assert "| clustering, as published | 99.7 (99.7 to 99.8), 1.30x |" in text
    assert "| average pooling, nearest | 98.5 (98.3 to 98.8), 1.30x |" in text
    assert "20 x 20 (0.51)" in text
    assert "backend `cpu`" in text


@pytest.mark.parametrize(
    ("given", "enough", "better"),
    [
        ({}, "reached", "reached"),
        ({"rival": (79.9, 59.9)}, "reached", "MISSED"),
        ({"published": (79.0, 59.5)}, "MISSED", "reached"),
    ],
)
def test_goals_are_said_to_be_reached_or_missed(given, enough, better):
    (line,) = tokens.goals(document(**given))
    assert f"goal 99.5 %: {enough}" in line
    assert f"goal better: {better}" in line
    assert "best baseline average pooling, nearest" in line


@pytest.mark.parametrize("speed", [1.3, None])
def test_picture_is_svg_and_has_a_line_for_each_method(speed):
    root = ElementTree.fromstring(tokens.picture(document(speed=speed)))
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == (2 if speed else 0)
    text = " ".join(root.itertext())
    assert ("not measured" in text) == (speed is None)
    assert ("Speed: not measured." in tokens.page(document(speed=speed))) == (speed is None)


def test_the_command_writes_both_and_refuses_another_file(tmp_path, capsys):
    (tmp_path / "README.md").write_text(f"{command.BEGIN}\n{command.END}\n")
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "token_clustering.json").write_text(json.dumps(document()))
    assert command.main(["--root", str(tmp_path)]) == 0
    assert (tmp_path / "docs" / "token_clustering.md").read_text() == tokens.page(document())
    assert (tmp_path / "docs" / "token_clustering.svg").is_file()
    assert command.main(["--root", str(tmp_path), "--check"]) == 0
    (results / "token_clustering.json").write_text(json.dumps({"rows": []}))
    assert command.main(["--root", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "token_clustering.json: expected what bench/accuracy/tokens.py writes" in said
